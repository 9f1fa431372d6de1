# SPDX-License-Identifier: Apache-2.0
"""From sources to HTTP: the registry that isolates them, the server, the status page.

The only importer of prometheus_client.
"""
