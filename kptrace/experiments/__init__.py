# SPDX-License-Identifier: Apache-2.0
"""Embedded nodes in network namespaces, kube-proxy-shaped rule sets, traffic and runs with the real daemon beside them.

The only package of kptrace that runs `ip`, `nft` and `iptables`: always in namespaces that it made itself.
"""
