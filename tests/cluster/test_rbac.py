# SPDX-License-Identifier: Apache-2.0
"""The role in deploy/ on a real API server: enough for kptrace to know its names, and for nothing else."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest

from kptrace.experiments import manifests
from kptrace.experiments.services import make_services
from kptrace.identity.resources import Level, resources
from kptrace.identity.source import Identity, IdentitySettings
from kptrace.model.identity import ServiceAddress, ServicePort
from kptrace.model.signal import State
from tests.cluster.accounts import account, apply, manifest, token_kubeconfig
from tests.cluster.client import Client, Object, StatusError, collection
from tests.cluster.controlplane import ControlPlane
from tests.cluster.objects import node, pod, reachable, running
from tests.cluster.programs import wait_for

_MANIFEST = Path(__file__).parents[2] / "deploy" / "daemonset.yaml"
_READS = ["list", "watch"]
_NODE = "node-rbac"


def _rules() -> list[Object]:
    (role,) = (obj for obj in manifest(_MANIFEST) if obj["kind"] == "ClusterRole")
    rules: list[Object] = role["rules"]
    return rules


def _resources() -> list[str]:
    return [resource for rule in _rules() for resource in rule["resources"]]


@pytest.fixture
def this_node(plane: ControlPlane) -> Iterator[str]:
    """A node beside another."""
    nodes = [plane.client.create(node(name)) for name in (_NODE, "node-elsewhere")]
    for number, made in enumerate(nodes):
        plane.client.set_status(made, reachable(made["metadata"]["name"], f"192.0.2.{20 + number}"))
    yield _NODE
    for made in nodes:
        plane.client.delete(made)


@pytest.fixture
def identities() -> Iterator[list[Identity]]:
    """Identities that are closed after the test."""
    opened: list[Identity] = []
    yield opened
    for identity in opened:
        identity.close()


def _watch(kubeconfig: Path, opened: list[Identity]) -> Identity:
    """All that kptrace can ever watch, without its random wait."""
    settings = IdentitySettings(
        level=Level.FULL, kubeconfig=kubeconfig, node=_NODE, endpoint_slices=True, start_delay=0.0
    )
    opened.append(identity := Identity.open(settings))
    identity.start()
    return identity


def _settled(identity: Identity) -> bool:
    """Whether every watch has all its objects, or has said why not."""
    identity.poll()
    return all(state.reason != "starting" for state in identity.states())


def test_the_manifest_suffices(
    plane: ControlPlane, kube_namespace: str, this_node: str, identities: list[Identity]
) -> None:
    """With the role of deploy/daemonset.yaml, taken as it is, kptrace knows exactly what was written."""
    apply(plane.client, manifest(_MANIFEST))
    specs = make_services(23, 3, namespace=kube_namespace)
    plane.client.create_all(manifests.objects(specs))
    for name, where, ip in (("here", this_node, "10.244.0.7"), ("there", "node-elsewhere", "10.244.0.8")):
        plane.client.set_status(plane.client.create(pod(name, kube_namespace, where)), running(ip))

    identity = _watch(token_kubeconfig(plane, "kptrace", "kptrace"), identities)
    wait_for(lambda: _settled(identity), "names")
    assert [state.state for state in identity.states()] == [State.ACTIVE] * 4
    known = identity.snapshot()
    written: dict[ServiceAddress, ServicePort] = {spec.address: spec.port for spec in specs}
    assert {at: port for at, port in known.services.items() if port.namespace != "default"} == written
    assert {port.name for port in known.services.values() if port.namespace == "default"} == {"kubernetes"}
    for spec in specs:
        assert known.endpoints[spec.port] == tuple(sorted(spec.endpoints))
    assert {ip: each.name for ip, each in known.pods_by_ip.items()} == {"10.244.0.7": "here"}
    assert known.nodes == {this_node: ("192.0.2.20",)}


@pytest.mark.parametrize("resource", _resources())
def test_each_resource_is_needed(resource: str, plane: ControlPlane, identities: list[Identity]) -> None:
    """Without any one resource of the role, the watch that needs it says that it may not."""
    rules = copy.deepcopy(_rules())
    for rule in rules:
        rule["resources"] = [each for each in rule["resources"] if each != resource]
    lacking = [rule for rule in rules if rule["resources"]]
    apply(plane.client, account(f"without-{resource}", "default", lacking))
    identity = _watch(token_kubeconfig(plane, "default", f"without-{resource}"), identities)
    wait_for(lambda: _settled(identity), "answers")
    reasons = {state.mechanism: state.reason for state in identity.states()}
    refused = [mechanism for mechanism, reason in reasons.items() if reason == "forbidden"]
    assert [name.replace("_", "") for name in refused] == [f"watch{resource}"]
    assert not identity.ready


def test_each_verb_is_needed(plane: ControlPlane) -> None:
    """Where kptrace cannot watch from the beginning it lists: by each resource both are allowed, and each is needed."""
    apply(plane.client, manifest(_MANIFEST))
    assert all(sorted(rule["verbs"]) == _READS for rule in _rules())
    config = token_kubeconfig(plane, "kptrace", "kptrace")
    with Client(plane.port, plane.authority.certificate, token=_token_of(config)) as client:
        for resource in resources(Level.FULL, node=_NODE, endpoint_slices=True):
            query = dict(resource.selectors)
            watch = {"watch": "1", "resourceVersion": "0", "timeoutSeconds": "1"}
            for more in ({"resourceVersion": "0"}, watch):
                assert client.raw("GET", resource.path, query={**query, **more})[0] == 200


@pytest.mark.parametrize("resource", _resources())
def test_without_the_verb_watch_nothing_is_known(
    resource: str, plane: ControlPlane, identities: list[Identity]
) -> None:
    """A role that may list one of the resources, and not watch it, is not enough."""
    rules = []
    for rule in _rules():
        others = [each for each in rule["resources"] if each != resource]
        rules += [{**rule, "resources": others}] if others else []
        if resource in rule["resources"]:
            rules.append({**rule, "resources": [resource], "verbs": ["list"]})
    apply(plane.client, account(f"lists-{resource}", "default", rules))
    identity = _watch(token_kubeconfig(plane, "default", f"lists-{resource}"), identities)
    wait_for(lambda: _settled(identity), "answers")
    assert [state.reason for state in identity.states()].count("forbidden") == 1


def test_nothing_else_is_allowed(plane: ControlPlane) -> None:
    """By its own account of its rights kptrace reads names and nothing else; secrets are refused."""
    apply(plane.client, manifest(_MANIFEST))
    config = token_kubeconfig(plane, "kptrace", "kptrace")
    with Client(plane.port, plane.authority.certificate, token=_token_of(config)) as client:
        review: Object = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectRulesReview",
            "spec": {"namespace": "kube-system"},
        }
        path = collection(review["apiVersion"], review["kind"])
        status = client.request("POST", path, review)["status"]
        everyone = [rule for rule in status["resourceRules"] if rule["verbs"] == ["create"]]
        assert all(each.startswith("selfsubject") for rule in everyone for each in rule["resources"])
        granted = {
            (group, resource, verb)
            for rule in status["resourceRules"]
            if rule not in everyone
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }
        wanted = {
            (group, resource, verb)
            for rule in _rules()
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in _READS
        }
        assert granted == wanted
        assert all(rule["verbs"] == ["get"] for rule in status["nonResourceRules"])
        for path in ("/api/v1/secrets", "/api/v1/namespaces/kptrace/configmaps", "/api/v1/serviceaccounts"):
            with pytest.raises(StatusError) as refused:
                client.request("GET", path)
            assert refused.value.code == 403


def _token_of(kubeconfig: Path) -> str:
    """The token that a kubeconfig of `token_kubeconfig` leads to."""
    return kubeconfig.with_suffix(".token").read_text(encoding="ascii")
