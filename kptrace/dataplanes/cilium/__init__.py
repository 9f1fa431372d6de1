# SPDX-License-Identifier: Apache-2.0
"""Cilium: its maps and programs as they are found in the kernel, and what its service maps say. Pure but for detect.py."""
