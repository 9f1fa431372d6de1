# SPDX-License-Identifier: Apache-2.0
"""Frozen types that every layer shares: no I/O, no clocks, no third-party imports."""
