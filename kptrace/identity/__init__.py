# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes names behind addresses: from a file or the API server to an immutable snapshot.

wire, decoding and objects decode one Kubernetes object, packing keeps endpoints small, claims and store reduce objects to a
snapshot, and none of them does I/O. manifests and files read `--identity-file`; connections, client, streaming, listing,
watch and watchfeed list and watch the API server; each hands messages (feed) to source, which alone owns the store.
Nothing outside this package imports `kubernetes`, and this package does so in one function only, where a kubeconfig is to
be read: the client costs 18 MiB, which a daemon in a pod does not pay.
"""
