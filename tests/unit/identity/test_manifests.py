# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kptrace.identity.manifests import MalformedError, parse
from kptrace.identity.records import Kind
from kptrace.identity.store import Store
from kptrace.identity.yaml_stream import YamlError, read
from kptrace.model.identity import Protocol, ServiceAddress, ServicePort, Snapshot

DATA = Path(__file__).parent / "data"


def snapshot_of(data: bytes) -> Snapshot:
    """The names in a manifest."""
    store = Store()
    for kind, records in parse(data, "m").items():
        store.replace(kind, records)
    return store.snapshot()


def test_what_kubectl_prints_becomes_names() -> None:
    """A List of all four kinds gives Services, endpoints, pods and nodes; other kinds are passed over."""
    snapshot = snapshot_of((DATA / "cluster.yaml").read_bytes())
    http = ServicePort("shop", "web", "http", Protocol.TCP)
    assert {address.ip for address, port in snapshot.services.items() if port == http} == {
        "10.96.0.20",
        "fd00:10:96::20",
        "192.0.2.10",
        "198.51.100.7",
    }
    assert snapshot.services[ServiceAddress("10.96.0.1", 443, Protocol.TCP)].name == "kubernetes"
    assert len(snapshot.services) == 9
    assert {key: port.port for key, port in snapshot.node_ports.items()} == {
        (30080, Protocol.TCP): "http",
        (30443, Protocol.UDP): "quic",
    }
    assert [(end.ip, end.pod, end.ready) for end in snapshot.endpoints[http]] == [
        ("10.1.0.5", "shop/web-a", True),
        ("10.1.1.6", "", False),
    ]
    assert {ip: pod.name for ip, pod in snapshot.pods_by_ip.items()} == {
        "10.1.0.5": "web-a",
        "fd00:10:1::5": "web-a",
    }
    assert snapshot.nodes == {"node-1": ("172.18.0.2",)}


def test_json_and_yaml_say_the_same() -> None:
    """`-o json` gives the same records as `-o yaml`."""
    text = (DATA / "cluster.yaml").read_bytes()
    as_json = json.dumps(yaml.safe_load(text)).encode()
    assert parse(as_json, "m") == parse(text, "m")


def test_several_documents_are_one_manifest() -> None:
    """Documents add up, and empty ones are nothing."""
    found = parse((DATA / "documents.yaml").read_bytes(), "m")
    assert [record.key for record in found[Kind.SERVICES]] == [("one", "a"), ("one", "b")]


def test_a_structural_error_has_line_document_item_and_object() -> None:
    """An item that is no good is found by its line, its place and its name; the public detail has no name."""
    with pytest.raises(MalformedError) as caught:
        parse((DATA / "wrong_port.yaml").read_bytes(), "names.yaml")
    assert str(caught.value) == (
        "names.yaml: line 9: document 1, item 2 (Service one/broken): "
        "spec.ports[0].port: expected an integer, found a string ('http')"
    )
    assert caught.value.detail == "line 9: document 1, item 2: spec.ports[0].port: expected an integer"
    assert caught.value.exit_code == 5
    assert "kubectl get" in caught.value.one_line()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((DATA / "wrong_indent.yaml").read_bytes(), "m: line 6: did not find expected"),
        (b"a: [1,\n2\n", "m: line 3: did not find expected"),
        (b"a: *b\n", "m: line 1: an alias"),
        (b"a: 1\n? [b]\n: c\n", "m: line 2: a mapping key that is no string"),
        (b"a: \x07\n", "m: (line 1: )?(a character that YAML forbids|control characters)"),
        (b"a: 1\nb: \xff\n", "m: line 2: expected UTF-8"),
        (b'{"kind": "List",\n"items": [}', "m: line 2: column 11: not JSON"),
        (b'{"kind": ' + b"1" * 5000 + b"}", "m: not JSON"),
        (b'{"items": ' + b"[" * 100_000, "m: JSON that is nested too deeply"),
        (b"[" * 100_000, "m: line 1: more than 100 levels of nesting"),
        (b"", "m: it is empty"),
        (b"# nothing\n---\n", "m: it is empty"),
        (b"just text\n", "m: line 1: document 1: the object: expected a mapping"),
        (b"apiVersion: v1\nkind: 7\n", r"m: line 1: document 1 \(7\): kind: expected a string"),
        (
            b"apiVersion: v1\nkind: List\nitems: [7]\n",
            "m: line 3: document 1, item 1: the object: expected a mapping",
        ),
    ],
)
def test_malformed_text_says_where_and_what(data: bytes, message: str) -> None:
    """Whatever is wrong with a manifest, it is one error that names the file and, where there is one, the line."""
    with pytest.raises(MalformedError, match=message):
        parse(data, "m")


def test_an_empty_list_is_a_cluster_without_objects() -> None:
    """Kubectl prints a List even for nothing."""
    assert not any(parse(b"apiVersion: v1\nkind: List\nitems: []\n", "m").values())


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=4).filter(lambda key: key != "items"), plain, max_size=4))
def test_the_fast_reader_agrees_with_pyyaml(value: dict[str, Any]) -> None:
    """What PyYAML writes of JSON-like values is read as the same values."""
    (located,) = read(yaml.safe_dump(value))
    assert located.value == value


@given(st.text(alphabet="ab:-[]{}?,#&*!|>'\"%@` \n\t0~", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    """Whatever the text, the reader gives values or says what is wrong."""
    try:
        list(read(text))
    except YamlError as error:
        assert error.problem
