# SPDX-License-Identifier: Apache-2.0
"""kptrace: how long the kernel takes to look a packet up, and how long a rule change takes to reach it."""

__version__ = "0.1.0"
