# SPDX-License-Identifier: Apache-2.0
"""What is asked of the API server, and no more than that: every node of the cluster asks."""

from dataclasses import dataclass
from enum import StrEnum

from kptrace.identity.records import Kind
from kptrace.identity.wire import HEADLESS_LABEL, PROXY_NAME_LABEL
from kptrace.model.errors import UsageError

#: kube-proxy's own selector, for Services and EndpointSlices alike: its watches and these share the server's caches.
KUBE_PROXY_SELECTOR = f"!{HEADLESS_LABEL},!{PROXY_NAME_LABEL}"


class Level(StrEnum):
    """How much of the cluster's names is watched (`--identity`)."""

    NONE = "none"
    SERVICES = "services"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Resource:
    """One thing to list and watch.

    Attributes:
        kind: of its objects.
        path: of its URL.
        selectors: query parameters that choose among the objects.
    """

    kind: Kind
    path: str
    selectors: tuple[tuple[str, str], ...] = ()

    @property
    def scope(self) -> str:
        """What its state is kept under: `watch_services`."""
        return f"watch_{self.kind}"


def resources(level: Level, *, node: str = "", endpoint_slices: bool = False) -> tuple[Resource, ...]:
    """What a level watches: Services; at `full` this node and its pods too.

    EndpointSlices if asked for, and this node with them: its zone chooses among endpoints.

    Raises:
        UsageError: `full` without the name of the node.
    """
    if level is Level.NONE:
        return ()
    by_label = (("labelSelector", KUBE_PROXY_SELECTOR),)
    found = [Resource(Kind.SERVICES, "/api/v1/services", by_label)]
    if endpoint_slices:
        found.append(Resource(Kind.ENDPOINT_SLICES, "/apis/discovery.k8s.io/v1/endpointslices", by_label))
    if level is Level.FULL:
        if not node:
            raise UsageError(
                "--identity=full needs the name of this node",
                remedy="set KPTRACE_NODE_NAME from the downward API's spec.nodeName, or --node-name",
            )
        found.append(Resource(Kind.PODS, "/api/v1/pods", (("fieldSelector", f"spec.nodeName={node}"),)))
    if node and (endpoint_slices or level is Level.FULL):
        found.append(Resource(Kind.NODES, "/api/v1/nodes", (("fieldSelector", f"metadata.name={node}"),)))
    return tuple(found)
