# SPDX-License-Identifier: Apache-2.0
"""Which endpoints are programmed on a node: what kptrace works out is what the real kube-proxy installs, rule by rule."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kptrace.experiments.netns import Namespace
from kptrace.identity.differences import Difference
from kptrace.identity.resources import Level
from kptrace.identity.source import Identity, IdentitySettings
from kptrace.model.identity import Endpoint, Hints
from tests.cluster.client import Object
from tests.cluster.controlplane import ControlPlane
from tests.cluster.kptrace import kptrace_kubeconfig
from tests.cluster.kubeproxy import KubeProxy, Mode
from tests.cluster.objects import Port, endpoint_slice, service
from tests.cluster.programs import wait_for

_NODE, _ELSEWHERE, _ZONE = "node-0", "node-1", "a"
_CHAIN = re.compile(r"chain (?:service|local)-[A-Z2-7]{8}-([^/\s]+)/([^/\s]+)/\S+ \{\n((?:\t\t.*\n)*)\t\}")
_ENDPOINT = re.compile(r"(?<=: )10\.244\.\d+\.(\d+) \. 8080")
_PROXY_LABEL = "service.kubernetes.io/service-proxy-name"


def end(
    last: int, *, node: str = _ELSEWHERE, state: str = "ready", zones: str = "", nodes: str = ""
) -> Endpoint:
    """An endpoint 10.244.N.LAST: ready, serving (it ends, and still answers), ending (it does not), or idle."""
    return Endpoint(
        f"10.244.0.{last}",
        8080,
        node=node,
        ready=state == "ready",
        serving=state in ("ready", "serving"),
        terminating=state in ("serving", "ending"),
        hints=Hints(tuple(zones.split()), tuple(nodes.split())),
    )


@dataclass(frozen=True, slots=True)
class Case:
    """A Service, its endpoints, and the last numbers of those that this node is to have; None where it has no Service."""

    endpoints: tuple[Endpoint, ...]
    expected: tuple[int, ...] | None
    kind: str = "ClusterIP"
    ip: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    spec: dict[str, object] = field(default_factory=dict)


_INTERNAL: dict[str, object] = {"internalTrafficPolicy": "Local"}
_EXTERNAL: dict[str, object] = {"externalTrafficPolicy": "Local"}
CASES = {
    "plain": Case((end(1), end(2, node=_NODE)), (1, 2)),
    "idle": Case((end(1, state="idle"), end(2)), (2,)),
    "nobody": Case((), ()),
    "leaving-beside-ready": Case((end(1, state="serving"), end(2)), (2,)),
    "all-leaving": Case((end(1, state="serving"), end(2, state="ending"), end(3, state="idle")), (1,)),
    "internal-local": Case((end(1), end(2, node=_NODE)), (2,), spec=_INTERNAL),
    "internal-local-nobody": Case((end(1),), (), spec=_INTERNAL),
    "internal-local-leaving": Case((end(1), end(2, node=_NODE, state="serving")), (2,), spec=_INTERNAL),
    "external-local": Case((end(1), end(2, node=_NODE)), (1, 2), kind="NodePort", spec=_EXTERNAL),
    "external-local-left-over": Case(
        (end(1), end(2, node=_NODE, state="serving")), (1, 2), kind="NodePort", spec=_EXTERNAL
    ),
    "both-local": Case(
        (end(1), end(2, node=_NODE)), (1, 2), kind="NodePort", spec={**_INTERNAL, **_EXTERNAL}
    ),
    "zone": Case((end(1, zones="a"), end(2, zones="b")), (1,)),
    "zone-of-two": Case((end(1, zones="b"), end(2, zones="a b")), (2,)),
    "zone-one-without": Case((end(1, zones="a"), end(2)), (1, 2)),
    "zone-for-nobody-here": Case((end(1, zones="b"), end(2, zones="c")), (1, 2)),
    "zone-and-leaving": Case((end(1, zones="b"), end(2, zones="a", state="serving")), (1,)),
    "node": Case((end(1, zones="a", nodes=_NODE), end(2, zones="a", nodes=_ELSEWHERE)), (1,)),
    "node-for-nobody-here": Case((end(1, zones="a", nodes=_ELSEWHERE), end(2, zones="b", nodes="x")), (1,)),
    "zone-and-external-local": Case(
        (end(1, zones="a"), end(2, zones="b", node=_NODE)), (1, 2), kind="NodePort", spec=_EXTERNAL
    ),
    "headless": Case((end(1),), None, ip="None"),
    "another-proxys": Case((end(1),), None, labels={_PROXY_LABEL: "mine"}),
}


class View:
    """What kptrace works out: the last numbers of each Service's endpoints."""

    def __init__(self, kubeconfig: Path) -> None:
        self._identity = Identity.open(
            IdentitySettings(
                level=Level.SERVICES, kubeconfig=kubeconfig, node=_NODE, endpoint_slices=True, start_delay=0.0
            )
        )
        self.found: dict[str, set[int]] = {}
        self._identity.follow(self._take)
        self._identity.start()

    def listed(self) -> bool:
        """Whether it has begun."""
        self._identity.poll()
        return self._identity.followed

    def poll(self) -> dict[str, set[int]]:
        """Take in what arrived; what is known then."""
        self._identity.poll()
        return self.found

    def close(self) -> None:
        """End it."""
        self._identity.close()

    def _take(self, difference: Difference) -> None:
        for port, _family in difference.before.keys() - difference.after.keys():
            self.found.pop(port.name, None)
        for (port, _family), wanted in difference.after.items():
            self.found[port.name] = {int(ip.rpartition(".")[2]) for ip, _ in wanted.endpoints}


@pytest.fixture
def view(plane: ControlPlane, start_kube_proxy: Callable[..., KubeProxy]) -> Iterator[View]:
    """What kptrace works out, beside a kube-proxy in this zone: both have nothing to do yet."""
    start_kube_proxy(Mode.NFTABLES, zone=_ZONE)
    made = View(kptrace_kubeconfig(plane))
    wait_for(made.listed, "kptrace's lists")
    yield made
    made.close()


def installed(netns: Namespace, namespace: str) -> dict[str, set[int]]:
    """The last numbers of the endpoints in all of a Service's chains."""
    found: dict[str, set[int]] = defaultdict(set)
    for where, name, body in _CHAIN.findall(netns.run(["nft", "list", "table", "ip", "kube-proxy"])):
        if where == namespace:
            found[name] |= {int(last) for last in _ENDPOINT.findall(body)}
    return found


def objects(name: str, namespace: str, case: Case) -> list[Object]:
    """What is written of a case. A controller would give the slice the label of its Service."""
    ips = (case.ip,) if case.ip else ()
    ports = (Port(),)
    labels = {"service.kubernetes.io/headless": ""} if case.ip == "None" else case.labels
    made = service(name, namespace, *ips, kind=case.kind, ports=ports, labels=case.labels, **case.spec)
    return [made, endpoint_slice(name, namespace, case.endpoints, labels=labels)]


def test_each_rule(plane: ControlPlane, kube_namespace: str, netns: Namespace, view: View) -> None:
    """Traffic policies, hints for zones and nodes, conditions, and Services that are none of kube-proxy's."""
    plane.client.create_all(
        obj for name, case in CASES.items() for obj in objects(name, kube_namespace, case)
    )
    check(CASES, kube_namespace, netns, view)


def test_conditions_that_change(
    plane: ControlPlane, kube_namespace: str, netns: Namespace, view: View
) -> None:
    """A pod that ends serves on while it is the last, and not once another one is ready."""
    steps = (
        ((end(1), end(2)), (1, 2)),
        ((end(1, state="serving"), end(2)), (2,)),
        ((end(1, state="serving"), end(2, state="serving")), (1, 2)),
        ((end(2, state="serving"), end(3, state="idle")), (2,)),
        ((end(2, state="ending"), end(3)), (3,)),
    )
    for number, (endpoints, expected) in enumerate(steps):
        case = Case(endpoints, expected)
        written = objects("web", kube_namespace, case)
        if number:
            plane.client.replace(written[1])
        else:
            plane.client.create_all(written)
        check({"web": case}, kube_namespace, netns, view)


def check(cases: dict[str, Case], namespace: str, netns: Namespace, view: View) -> None:
    """kube-proxy has installed what is expected, and kptrace works out the same."""
    expected = {name: set(case.expected) for name, case in cases.items() if case.expected is not None}
    wait_for(
        lambda: (
            {name: ends for name, ends in installed(netns, namespace).items() if ends}
            == {name: ends for name, ends in expected.items() if ends}
        ),
        "the rules",
        detail=lambda: f"{installed(netns, namespace)}\n{expected}",
    )
    wait_for(
        lambda: view.poll() == expected, "the same of kptrace", detail=lambda: f"{view.found}\n{expected}"
    )
