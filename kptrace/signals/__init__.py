# SPDX-License-Identifier: Apache-2.0
"""One signal a stem: its maps, its mechanisms in order, its pure reducer and its metric families.

Signals know what the kernel and the data planes tell; they print nothing, and know nothing of Prometheus.
"""
