# SPDX-License-Identifier: Apache-2.0
"""Names from a real API server: what each kind of Service is reached by, and watches that lose their place."""

import random
from collections.abc import Callable, Iterator, Mapping

import pytest

from kptrace.experiments import manifests
from kptrace.experiments.services import make_services
from kptrace.identity.api import ApiError, Response
from kptrace.identity.client import KubernetesApi
from kptrace.identity.feed import Listed
from kptrace.identity.resources import Level, resources
from kptrace.identity.source import ERRORS, Identity, IdentitySettings
from kptrace.identity.streaming import stream
from kptrace.identity.watch import Cursor, Tools, list_then_watch
from kptrace.model.identity import Endpoint, Protocol, ServiceAddress, ServicePort
from kptrace.model.metrics import Sample
from tests.cluster.controlplane import ControlPlane
from tests.cluster.kptrace import kptrace_kubeconfig
from tests.cluster.objects import Port, endpoint_slice, load_balancer, service
from tests.cluster.programs import wait_for

_TCP = Protocol.TCP


@pytest.fixture
def identity(plane: ControlPlane) -> Iterator[Identity]:
    """Services and EndpointSlices, by kptrace's own account."""
    settings = IdentitySettings(
        Level.SERVICES, kubeconfig=kptrace_kubeconfig(plane), endpoint_slices=True, start_delay=0.0
    )
    opened = Identity.open(settings)
    opened.start()
    yield opened
    opened.close()


@pytest.fixture
def until(identity: Identity) -> Callable[[Callable[[], bool], str], None]:
    """Poll until a condition holds."""

    def wait(condition: Callable[[], bool], what: str) -> None:
        def holds() -> bool:
            identity.poll()
            return condition()

        wait_for(holds, what, seconds=90.0, detail=lambda: f"{identity.states()}")

    return wait


Until = Callable[[Callable[[], bool], str], None]


def _errors(identity: Identity, reason: str) -> float:
    (found,) = [family for family in identity.families() if family.spec is ERRORS]
    return sum(each.value for each in found.samples if isinstance(each, Sample) and each.labels[1] == reason)


def _addresses(identity: Identity, name: str) -> set[str]:
    return {at.ip for at, port in identity.snapshot().services.items() if port.name == name}


def test_every_kind_of_service_is_known_by_its_addresses(
    plane: ControlPlane, kube_namespace: str, identity: Identity, until: Until
) -> None:
    """Node ports, balancers, external IPs, two families, no endpoints; headless and another proxy's have no address."""
    end4, end6 = Endpoint("10.244.0.1", 8080, node="node-0"), Endpoint("fd00:244::1", 8080)
    client = plane.client
    client.create(
        service("node-port", kube_namespace, "10.96.9.1", kind="NodePort", ports=(Port(node_port=30017),))
    )
    balanced = client.create(service("balanced", kube_namespace, "10.96.9.2", kind="LoadBalancer"))
    client.set_status(balanced, load_balancer("203.0.113.2"))
    proxied = client.create(service("proxied", kube_namespace, "10.96.9.3", kind="LoadBalancer"))
    client.set_status(proxied, load_balancer("203.0.113.3", mode="Proxy"))
    client.create(service("external", kube_namespace, "10.96.9.4", external_ips=("198.51.100.4",)))
    client.create(service("dual", kube_namespace, "10.96.9.5", "fd00:96::905"))
    client.create(service("idle", kube_namespace, "10.96.9.6"))
    client.create(service("headless", kube_namespace, "None"))
    other = {"service.kubernetes.io/service-proxy-name": "other"}
    client.create(service("foreign", kube_namespace, "10.96.9.7", labels=other))
    client.create(endpoint_slice("dual", kube_namespace, [end4]))
    client.create(endpoint_slice("dual", kube_namespace, [end6], family="IPv6"))
    client.create(service("last", kube_namespace, "10.96.9.9"))

    until(lambda: _addresses(identity, "last") == {"10.96.9.9"}, "the last Service")
    until(lambda: len(identity.snapshot().endpoints.get(_port(kube_namespace, "dual"), ())) == 2, "endpoints")
    known = identity.snapshot()
    assert {
        name: _addresses(identity, name) for name in ("node-port", "balanced", "proxied", "external")
    } == {
        "node-port": {"10.96.9.1"},
        "balanced": {"10.96.9.2", "203.0.113.2"},
        "proxied": {"10.96.9.3"},
        "external": {"10.96.9.4", "198.51.100.4"},
    }
    assert known.node_ports[30017, _TCP] == _port(kube_namespace, "node-port")
    assert _addresses(identity, "dual") == {"10.96.9.5", "fd00:96::905"}
    assert known.services[ServiceAddress("10.96.9.6", 80, _TCP)] == _port(kube_namespace, "idle")
    assert _port(kube_namespace, "idle") not in known.endpoints
    assert {end.ip for end in known.endpoints[_port(kube_namespace, "dual")]} == {"10.244.0.1", "fd00:244::1"}
    assert not _addresses(identity, "headless")
    assert not _addresses(identity, "foreign")


def _port(namespace: str, name: str) -> ServicePort:
    return ServicePort(namespace, name, "http", _TCP)


def test_an_outage_keeps_the_names_and_a_lost_place_is_found_again(
    plane: ControlPlane, kube_namespace: str, identity: Identity, until: Until
) -> None:
    """A server that starts anew has forgotten old versions (410): all is listed again, what has gone meanwhile is gone."""
    gone, kept = (
        service(name, kube_namespace, ip) for name, ip in (("gone", "10.96.9.1"), ("kept", "10.96.9.2"))
    )
    for each in (gone, kept):
        plane.client.create(each)
    until(lambda: bool(_addresses(identity, "gone") and _addresses(identity, "kept")), "names")
    with plane.outage():
        until(lambda: _errors(identity, "unreachable") > 0, "the outage")
        assert _addresses(identity, "gone")
    # Until the watch is back, which waits a second at least.
    plane.client.delete(gone)
    plane.client.create(service("new", kube_namespace, "10.96.9.3"))
    until(lambda: bool(_addresses(identity, "new")), "the watch")
    assert not _addresses(identity, "gone")
    assert _addresses(identity, "kept")
    # A server that has just started may refuse what it allows once it has read its own rules.
    until(lambda: {state.reason for state in identity.states()} == {"ok"}, "both watches")


def test_an_expired_version_is_refused_and_the_next_list_is_whole(
    plane: ControlPlane, kube_namespace: str
) -> None:
    """From a version of long ago the real server answers 410; the cursor is emptied, and all objects come."""
    plane.client.create(service("web", kube_namespace, "10.96.9.1"))
    api = KubernetesApi(kptrace_kubeconfig(plane))
    (watched,) = resources(Level.SERVICES)
    tools, cursor = Tools(lambda: 0.0, lambda _: True, random.Random(1)), Cursor("1")
    try:
        with pytest.raises(ApiError) as refused:
            for _ in list_then_watch(api, watched, cursor, tools):
                pass
        assert refused.value.reason == "expired"
        assert cursor.version == ""
        first = next(
            each for each in list_then_watch(api, watched, cursor, tools) if isinstance(each, Listed)
        )
        assert "web" in {record.key[1] for record in first.records}
        # What a server answers that cannot begin a watch so, here for want of a parameter: then the list is asked for.
        query = {**dict(watched.selectors), "watch": "1", "resourceVersion": "0", "sendInitialEvents": "true"}
        with pytest.raises(ApiError) as unfit:
            next(iter(stream(api, watched.path, query, lambda: 0.0)))
        assert unfit.value.status == 422
    finally:
        api.close()


class _Older:
    """The real server, as if it could not begin a watch with all objects."""

    def __init__(self, api: KubernetesApi) -> None:
        self._api = api

    def get(self, path: str, query: Mapping[str, str], *, read_timeout: float) -> Response:
        """Ask, unless it is for that."""
        if "sendInitialEvents" in query:
            raise ApiError("http_error", "not here", status=422)
        return self._api.get(path, query, read_timeout=read_timeout)


def test_a_list_and_a_watch_from_the_beginning_are_the_same(plane: ControlPlane, kube_namespace: str) -> None:
    """Objects that come as one list from the server's cache are those that come as events."""
    specs = make_services(50, 30, namespace=kube_namespace)
    plane.client.create_all(manifests.objects(specs))
    api = KubernetesApi(kptrace_kubeconfig(plane))
    tools = Tools(lambda: 0.0, lambda _: True, random.Random(1))
    try:
        for watched in resources(Level.SERVICES, endpoint_slices=True):
            found = [
                next(
                    each
                    for each in list_then_watch(way, watched, Cursor(), tools)
                    if isinstance(each, Listed)
                )
                for way in (api, _Older(api))
            ]
            events, listed = ({record.key: record for record in each.records} for each in found)
            assert events == listed
            assert {spec.port.name for spec in specs} <= {
                key[1].removesuffix("-http-ipv4-0") for key in listed
            }
    finally:
        api.close()
