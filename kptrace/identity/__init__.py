# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes names behind addresses: from a file or the API server to an immutable snapshot.

objects decode one Kubernetes object, claims and store reduce objects to a snapshot, and both do no I/O. manifests and
files read `--identity-file`, resources, client, watch and watchfeed list and watch the API server; each hands messages
(feed) to source, which alone owns the store. Nothing outside this package imports `kubernetes`, and this package does
so in one function only: the client costs tens of megabytes, which a daemon without an API server does not pay.
"""
