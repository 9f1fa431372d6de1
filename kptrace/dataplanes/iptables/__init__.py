# SPDX-License-Identifier: Apache-2.0
"""iptables-legacy: tables by name from procfs, and the header of a table's replacement."""
