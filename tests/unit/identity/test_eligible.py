# SPDX-License-Identifier: Apache-2.0
"""Which endpoints kube-proxy programs on a node: the cases of pkg/proxy/topology_test.go, and the fields they need."""

from typing import Any

import pytest

from kptrace.identity.eligible import Place, Wanted, eligible, wanted
from kptrace.identity.objects import decode
from kptrace.identity.records import Kind, LocalPolicy, NodeRecord, PortRecord, ServiceRecord, SliceRecord
from kptrace.identity.store import Store
from kptrace.model.identity import NO_HINTS, Endpoint, Hints, Protocol, ServicePort
from kptrace.model.netfilter import IpFamily

HERE = Place("here", "a")
NONE, INTERNAL, EXTERNAL = LocalPolicy.NONE, LocalPolicy.INTERNAL, LocalPolicy.EXTERNAL
WEB = ServicePort("ns", "web", "http", Protocol.TCP)
HTTP = ("http", Protocol.TCP)


def end(last: int, node: str = "there", state: str = "ready", zones: str = "", nodes: str = "") -> Endpoint:
    """An endpoint 10.0.0.LAST: ready, serving (and terminating), or neither."""
    return Endpoint(
        f"10.0.0.{last}",
        80,
        node=node,
        ready=state == "ready",
        serving=state in ("ready", "serving"),
        terminating=state in ("serving", "ending"),
        hints=Hints(tuple(zones.split()), tuple(nodes.split())),
    )


def chosen(endpoints: list[Endpoint], local: LocalPolicy, *, outside: bool, place: Place = HERE) -> list[int]:
    """Last parts of the addresses that are programmed."""
    return sorted(int(each.ip.split(".")[-1]) for each in eligible(endpoints, local, place, outside=outside))


@pytest.mark.parametrize(
    ("zones", "expected"),
    [
        (["a", "b"], [1]),
        (["a", ""], [1, 2]),
        (["b", "b"], [1, 2]),
        (["a b", "b"], [1]),
    ],
    ids=["for the zone", "one without", "none for the zone", "for two zones"],
)
def test_zone_hints_count_where_all_have_them_and_one_is_for_here(
    zones: list[str], expected: list[int]
) -> None:
    """Otherwise every ready endpoint is programmed."""
    ends = [end(number, zones=each) for number, each in enumerate(zones, 1)]
    assert chosen(ends, NONE, outside=False) == expected
    assert chosen(ends, NONE, outside=False, place=Place("here")) == [1, 2]


def test_node_hints_come_before_zone_hints() -> None:
    """Where no endpoint is hinted for the node, the zone's are taken."""
    ends = [end(1, zones="a", nodes="other"), end(2, zones="a", nodes="here"), end(3, zones="b", nodes="far")]
    assert chosen(ends, NONE, outside=False) == [2]
    assert chosen(ends[::2], NONE, outside=False) == [1]
    assert chosen([*ends, end(4, zones="b")], NONE, outside=False) == [1, 2]


def test_hints_of_endpoints_that_are_not_ready_do_not_count() -> None:
    """Neither that they are missing, nor for whom they are."""
    ends = [end(1, zones="a"), end(2, zones="b"), end(3, state="ending"), end(4, state="serving", zones="a")]
    assert chosen(ends, NONE, outside=False) == [1]
    assert chosen(ends[1:], NONE, outside=False) == [2]


def test_where_none_is_ready_those_that_end_and_serve_are_programmed() -> None:
    """An endpoint that is neither is never; hints do not count for these."""
    ends = [end(1, state="serving", zones="b"), end(2, state="ending"), end(3, state="off")]
    assert chosen(ends, NONE, outside=False) == [1]
    assert chosen([*ends, end(4)], NONE, outside=False) == [4]
    assert chosen([], NONE, outside=True) == []
    assert chosen([end(3, state="off")], NONE, outside=True) == []


def test_internal_policy_local_takes_the_nodes_own_only() -> None:
    """Hints do not count then; with ways in from outside the Cluster endpoints are programmed too."""
    ends = [end(1, "here", zones="b"), end(2, zones="a")]
    assert chosen(ends, INTERNAL, outside=False) == [1]
    assert chosen(ends, INTERNAL, outside=True) == [1, 2]
    assert chosen(ends[1:], INTERNAL, outside=False) == []
    assert chosen(ends, INTERNAL, outside=False, place=Place()) == []
    assert chosen(ends, NONE, outside=True) == [2]


def test_external_policy_local_takes_the_nodes_own_beside_the_others() -> None:
    """It means nothing to a Service port that is not reached from outside."""
    ends = [end(1, "here", zones="b"), end(2, zones="a")]
    assert chosen(ends, EXTERNAL, outside=True) == [1, 2]
    assert chosen(ends, EXTERNAL, outside=False) == [2]


def test_each_policy_falls_back_for_itself() -> None:
    """A local endpoint that ends serves policy Local while ready ones elsewhere serve policy Cluster."""
    ends = [end(1, "here", "serving"), end(2), end(3, "there", "serving")]
    assert chosen(ends, EXTERNAL, outside=True) == [1, 2]
    assert chosen(ends, INTERNAL, outside=False) == [1]
    assert chosen(ends, NONE, outside=True) == [2]


def raw_service(**spec: Any) -> ServiceRecord:
    """A Service `ns/web` at 10.96.0.1 with the port http."""
    base = {"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "ports": [{"name": "http", "port": 80}]}
    record = decode(Kind.SERVICES, {"metadata": {"name": "web", "namespace": "ns"}, "spec": {**base, **spec}})
    assert isinstance(record, ServiceRecord)
    return record


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, NONE),
        ({"internalTrafficPolicy": "Local"}, INTERNAL),
        ({"internalTrafficPolicy": "Cluster", "externalTrafficPolicy": "Local"}, NONE),
        ({"type": "NodePort", "externalTrafficPolicy": "Local"}, EXTERNAL),
        ({"type": "LoadBalancer", "externalTrafficPolicy": "Cluster"}, NONE),
        ({"externalIPs": ["192.0.2.1"], "externalTrafficPolicy": "Local"}, EXTERNAL),
    ],
)
def test_policies_that_are_in_force(spec: dict[str, Any], expected: LocalPolicy) -> None:
    """The external policy is left over when a Service is no longer reached from outside."""
    record = raw_service(**spec)
    assert record.local == expected
    assert record.cluster_ips == 1


def raw_slice(*ends: dict[str, Any], **metadata: Any) -> SliceRecord:
    """An EndpointSlice of ns/web with the port http."""
    labels = {"kubernetes.io/service-name": "web"}
    record = decode(
        Kind.ENDPOINT_SLICES,
        {
            "metadata": {"name": "web-1", "namespace": "ns", "labels": labels, **metadata},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080}],
            "endpoints": [{"addresses": [f"10.1.0.{n}"], **each} for n, each in enumerate(ends, 1)],
        },
    )
    assert isinstance(record, SliceRecord)
    return record


def test_hints_are_decoded_and_shared() -> None:
    """There are many endpoints and few different hints."""
    zone = {"hints": {"forZones": [{"name": "b"}, {"name": "a"}], "forNodes": [{"name": "n"}]}}
    record = raw_slice(zone, zone, {"hints": {}}, {})
    ends = record.endpoints[0][1]
    assert [each.hints for each in ends] == [Hints(("a", "b"), ("n",))] * 2 + [NO_HINTS] * 2
    assert ends[0].hints is ends[1].hints
    assert ends[2].hints is ends[3].hints is NO_HINTS


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        ("2024-01-01T00:00:00Z", 1_704_067_200_000_000_000),
        ("2024-01-01T00:00:00.123456789Z", 1_704_067_200_123_456_000),
        ("2024-01-01T01:00:00+01:00", 1_704_067_200_000_000_000),
        ("2024-01-01T00:00:00", 0),
        ("1969-12-31T23:59:59Z", 0),
        ("yesterday", 0),
        (17, 0),
        (None, 0),
    ],
)
def test_the_trigger_time_is_read_or_left_out(annotation: object, expected: int) -> None:
    """Anybody may write an annotation: a wrong one is no error."""
    record = raw_slice(annotations={"endpoints.kubernetes.io/last-change-trigger-time": annotation})
    assert record.trigger_ns == expected


def test_an_update_of_the_annotation_alone_changes_nothing() -> None:
    """The store keeps the slice that it has."""
    store = Store()
    when = "endpoints.kubernetes.io/last-change-trigger-time"
    assert store.apply(raw_slice({}, annotations={when: "2024-01-01T00:00:00Z"}))
    assert not store.apply(raw_slice({}, annotations={when: "2024-01-01T00:00:01Z"}))
    assert store.apply(raw_slice({"conditions": {"ready": False}}))


def test_a_nodes_zone_is_known_by_its_name() -> None:
    """Empty where the node has none, or is not known."""
    store = Store()
    labels = {"topology.kubernetes.io/zone": "a"}
    node = decode(Kind.NODES, {"metadata": {"name": "n", "labels": labels}})
    assert isinstance(node, NodeRecord)
    store.apply(node)
    assert store.zone("n") == "a"
    assert store.zone("m") == ""


def test_the_store_gives_what_a_service_is_made_of() -> None:
    """By its name; slices also before their Service."""
    store = Store()
    store.apply(raw_slice({}))
    assert store.service(("ns", "web")) is None
    assert [record.name for record in store.slices_of(("ns", "web"))] == ["web-1"]
    store.apply(raw_service())
    found = store.service(("ns", "web"))
    assert found is not None
    assert wanted(found, store.slices_of(("ns", "web")), HERE) == {
        (WEB, IpFamily.IPV4): Wanted(frozenset({("10.96.0.1", 80)}), frozenset({("10.1.0.1", 8080)}))
    }


def test_both_families_are_apart() -> None:
    """Endpoints and external addresses of a family without a cluster IP are not programmed; node ports are in both."""
    port = PortRecord(WEB, "http", 80, 30080)
    ends = Endpoint("10.1.0.1", 8080), Endpoint("fd00::1", 8080)
    slices = [SliceRecord("ns", "s", "web", ((HTTP, ends),))]
    dual = ServiceRecord("ns", "web", 1, (port,), ("10.96.0.1", "fd00:96::1", "192.0.2.1"), 2)
    assert wanted(dual, slices, HERE) == {
        (WEB, IpFamily.IPV4): Wanted(
            frozenset({("10.96.0.1", 80), ("192.0.2.1", 80), ("", 30080)}), frozenset({("10.1.0.1", 8080)})
        ),
        (WEB, IpFamily.IPV6): Wanted(
            frozenset({("fd00:96::1", 80), ("", 30080)}), frozenset({("fd00::1", 8080)})
        ),
    }
    single = ServiceRecord("ns", "web", 1, (port,), ("10.96.0.1", "2001:db8::1"), 1)
    assert list(wanted(single, slices, HERE)) == [(WEB, IpFamily.IPV4)]
    assert wanted(None, slices, HERE) == {}


@pytest.mark.parametrize(
    "raw",
    [
        {"spec": {"clusterIP": "None", "clusterIPs": ["None"]}},
        {"spec": {"type": "ExternalName", "externalName": "example.org"}},
        {"labels": {"service.kubernetes.io/service-proxy-name": "other"}},
        {"labels": {"service.kubernetes.io/headless": ""}},
    ],
)
def test_services_that_kube_proxy_does_not_serve_want_nothing(raw: dict[str, Any]) -> None:
    """Headless, ExternalName, and another proxy's."""
    metadata = {"name": "web", "namespace": "ns", "labels": raw.get("labels")}
    spec = {"clusterIP": "10.96.0.1", "ports": [{"port": 80}], **raw.get("spec", {})}
    record = decode(Kind.SERVICES, {"metadata": metadata, "spec": spec})
    assert isinstance(record, ServiceRecord)
    assert wanted(record, [], HERE) == {}


def test_of_two_endpoints_at_one_address_the_one_that_stays_counts() -> None:
    """The old pod's slice may be late; only a slice's own port counts."""
    old, new = end(1, state="serving"), end(1)
    other = SliceRecord("ns", "c", "web", ((("metrics", Protocol.TCP), (end(9),)),))
    slices = [SliceRecord("ns", name, "web", ((HTTP, (each,)),)) for name, each in (("a", new), ("b", old))]
    for order in (slices, slices[::-1]):
        found = wanted(
            ServiceRecord("ns", "web", 1, (PortRecord(WEB, "http", 80),), ("10.96.0.1",), 1),
            [*order, other],
            HERE,
        )
        assert found[WEB, IpFamily.IPV4].endpoints == {("10.0.0.1", 80)}
