# SPDX-License-Identifier: Apache-2.0
"""An embedded node: a client, a node that translates Service addresses, and back ends, in three namespaces.

```
client (any source address in the client range) ── clients │ node │ backends ── back ends (any address answers)
                                                    PREROUTING   OUTPUT for what the node itself sends
```
"""

import sys
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from kptrace.experiments.interrupts import unhurried
from kptrace.experiments.netns import Namespace, sweep
from kptrace.experiments.services import BACKEND_PORT, PLANS, SINK_PORT
from kptrace.model.errors import KptraceError, UnsupportedError
from kptrace.model.netfilter import IpFamily

_FORWARDING = {
    "net.ipv4.ip_forward": "1",
    "net.ipv6.conf.all.forwarding": "1",
    "net.ipv4.conf.all.rp_filter": "0",
    "net.ipv4.conf.default.rp_filter": "0",
}
#: Clients and back ends send from a whole range of addresses, which no interface has.
_ANY_SOURCE = {"net.ipv4.ip_nonlocal_bind": "1", "net.ipv6.ip_nonlocal_bind": "1"}


class EmbeddedNode:
    """Three namespaces and a back-end process; a context manager that leaves nothing behind.

    Packets from `client` to a Service address meet the node's PREROUTING, those from `node` its OUTPUT. The node has
    no rules of its own: `RuleWriter` installs them.

    Attributes:
        node: the namespace that rules are installed in; `node.path` is what kptrace watches by `--netns`.
        client: where connections come from.
        backend: where every address of the back-end range answers.
    """

    def __init__(self) -> None:
        self.node = Namespace("node")
        self.client = Namespace("client")
        self.backend = Namespace("backend")

    def __enter__(self) -> Self:
        try:
            sweep()
            for namespace in (self.backend, self.client, self.node):
                namespace.__enter__()
            self._wire()
            self._serve()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything. Idempotent."""
        # A stack, so that one that cannot be removed does not keep the others.
        with unhurried(), ExitStack() as stack:
            for namespace in (self.node, self.client, self.backend):
                stack.callback(namespace.remove)

    def _wire(self) -> None:
        """Links, addresses and routes."""
        self.node.sysctl(_FORWARDING)
        self.client.sysctl(_ANY_SOURCE)
        self.backend.sysctl(_ANY_SOURCE)
        self.node.ip(
            [
                f"link add clients type veth peer name eth0 netns {self.client.name}",
                f"link add backends type veth peer name eth0 netns {self.backend.name}",
            ]
        )
        node = ["link set clients up", "link set backends up"]
        client = ["link set eth0 up"]
        backend = ["link set eth0 up"]
        for family, plan in PLANS.items():
            nodad = "" if family is IpFamily.IPV4 else " nodad"
            for link, device, lines in (
                (plan.client_link, "clients", client),
                (plan.backend_link, "backends", backend),
            ):
                node.append(f"addr add {link[1]}/{link.prefixlen} dev {device}{nodad}")
                lines.append(f"addr add {link[2]}/{link.prefixlen} dev eth0{nodad}")
                lines.append(f"route add default via {link[1]} dev eth0")
            node.append(f"route add {plan.clients} via {plan.client_link[2]} dev clients")
            node.append(f"route add {plan.backends} via {plan.backend_link[2]} dev backends")
            # A real node has a default route: what it sends to a Service address is routed before OUTPUT sees it.
            node.append(f"route add default via {plan.backend_link[2]} dev backends")
            client.append(f"route add local {plan.clients} dev lo")
            backend.append(f"route add local {plan.backends} dev lo")
        self.node.ip(node)
        self.client.ip(client)
        self.backend.ip(backend)

    def _serve(self) -> None:
        """Start the back ends and wait until they listen."""
        argv = [sys.executable, "-m", "kptrace.experiments.backend", str(BACKEND_PORT), str(SINK_PORT)]
        process = self.backend.popen(argv, stdin=True)
        if process.stdout is None or process.stderr is None:
            raise KptraceError("the back ends were started without pipes")
        if process.stdout.readline() != "ready\n":
            raise UnsupportedError(f"the back ends did not start: {process.stderr.read().strip()[-400:]}")
