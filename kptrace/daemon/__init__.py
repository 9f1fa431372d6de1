# SPDX-License-Identifier: Apache-2.0
"""Wiring and life cycle: one thread owns all mutable state and one epoll."""
