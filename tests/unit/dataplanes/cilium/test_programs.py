# SPDX-License-Identifier: Apache-2.0
"""Cilium's entry programs by name, and what their return codes mean."""

from collections import Counter

import pytest

from kptrace.dataplanes.cilium.layouts import KERNEL_NAME
from kptrace.dataplanes.cilium.programs import KINDS, Verdict, kind_of, verdict
from kptrace.dataplanes.cilium.reasons import direction_name, is_drop, reason_name


@pytest.mark.parametrize("chain", [kind.chain for kind in KINDS])
def test_every_kind_is_found_by_its_whole_name_and_what_the_kernel_keeps_of_it(chain: str) -> None:
    """With the prefix the name is enough; without, as up to 1.12, it may be anyone's."""
    kind = kind_of("cil_" + chain)
    assert kind is not None
    assert kind.chain == chain
    assert kind.certain
    assert kind_of(("cil_" + chain)[:KERNEL_NAME]) == kind
    old = kind_of(chain)
    assert old is not None
    assert (old.chain, old.certain) == (chain, False)
    assert kind_of(chain[:KERNEL_NAME]) == old
    assert kind_of(chain.replace("_", "-")) == old


def test_kept_names_are_unique() -> None:
    """No two kinds begin alike for 15 characters, with the prefix or without."""
    for prefix in ("cil_", ""):
        kept = Counter((prefix + kind.chain)[:KERNEL_NAME] for kind in KINDS)
        assert set(kept.values()) == {1}


@pytest.mark.parametrize(
    ("name", "chain"),
    [
        ("handle_xgress", "from_container"),
        ("handle_to_conta", "to_container"),
        ("bpf_xdp_entry", "xdp_entry"),
    ],
)
def test_old_names_that_are_others_are_known(name: str, chain: str) -> None:
    """Those of 1.12 and before."""
    kind = kind_of(name)
    assert kind is not None
    assert kind.chain == chain


@pytest.mark.parametrize(
    "name",
    [
        "cil_lxc_policy",
        "cil_lxc_policy_egress",
        "cil_lxc_policy_",
        "cil_host_policy",
        "tail_handle_ipv4",
        "calico_tc_main",
        "",
    ],
)
def test_tail_called_and_others_programs_are_none(name: str) -> None:
    """A tail-called program is never entered by the kernel itself: nothing would be seen of it."""
    assert kind_of(name) is None


def test_hooks_families_and_directions() -> None:
    """What comes in at the host's end of a pod's pair leaves the pod."""
    shown = {kind.chain: (kind.hook, kind.direction, kind.of, kind.family) for kind in KINDS}
    assert shown["from_container"] == ("tc_ingress", "egress", "endpoint", "")
    assert shown["to_container"] == ("tc_egress", "ingress", "endpoint", "")
    assert shown["from_netdev"] == ("tc_ingress", "ingress", "network", "")
    assert shown["to_host"] == ("tc_ingress", "ingress", "host", "")
    assert shown["xdp_entry"] == ("xdp", "ingress", "xdp", "")
    assert shown["sock4_connect"] == ("cgroup_connect", "egress", "socket", "ipv4")
    assert shown["sock6_recvmsg"] == ("cgroup_recvmsg", "ingress", "socket", "ipv6")
    by_priority = sorted(KINDS, key=lambda kind: kind.priority)
    assert by_priority[0].hook in ("cgroup_connect", "cgroup_sendmsg")


@pytest.mark.parametrize(
    ("name", "code", "expected"),
    [
        ("cil_from_container", -1, "accept"),
        ("cil_from_container", 0xFFFFFFFF, "accept"),
        ("cil_from_container", 0, "accept"),
        ("cil_from_container", 2, "drop"),
        ("cil_from_container", 7, "accept"),
        ("cil_xdp_entry", 0, "drop"),
        ("cil_xdp_entry", 1, "drop"),
        ("cil_xdp_entry", 2, "accept"),
        ("cil_xdp_entry", 3, "accept"),
        ("cil_xdp_entry", 4, "accept"),
        ("cil_xdp_entry", 99, "drop"),
        ("cil_sock4_connect", 1, "accept"),
        ("cil_sock4_connect", 0, "drop"),
        ("cil_sock6_recvmsg", 1, "accept"),
    ],
)
def test_return_codes(name: str, code: int, expected: Verdict) -> None:
    """TC_ACT_SHOT, XDP_DROP and XDP_ABORTED, and a refused call are drops."""
    kind = kind_of(name)
    assert kind is not None
    assert verdict(kind, code) == expected


def test_reasons_have_the_agents_names() -> None:
    """What has none is its number; only from 130 on a reason is a drop."""
    assert reason_name(0) == "Success"
    assert reason_name(133) == "Policy denied"
    assert reason_name(158) == "Service backend not found"
    assert reason_name(255) == "255"
    assert [code for code in range(256) if is_drop(code)] == list(range(130, 256))
    names = Counter(reason_name(code) for code in range(256))
    assert max(names.values()) == 1


def test_directions_are_the_two_low_bits() -> None:
    """The others are padding."""
    assert [direction_name(code) for code in (0, 1, 2, 3, 5)] == [
        "unknown",
        "ingress",
        "egress",
        "service",
        "ingress",
    ]
