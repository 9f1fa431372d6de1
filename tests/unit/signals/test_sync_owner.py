# SPDX-License-Identifier: Apache-2.0
"""Whose run a process belongs to."""

from kptrace.model.rewrite import ProcessRun
from kptrace.signals.sync_owner import Owner, find_owner
from kptrace.signals.writers import Writers, parse_writer

WRITERS = Writers([parse_writer("edge=cgroup:*/edge.service")])


def process(tgid: int, executable: str, parent: int = 1) -> ProcessRun:
    """A process."""
    return ProcessRun(tgid, parent, executable=executable)


SYSTEMD = process(1, "/usr/lib/systemd/systemd", 0)
PROXY = process(20, "/usr/local/bin/kube-proxy", 10)
SHIM = process(10, "/usr/bin/containerd-shim-runc-v2")
NFT = process(30, "/usr/sbin/nft", 20)


def test_a_tool_works_for_the_class_above_it() -> None:
    """Also through a shell."""
    assert find_owner([NFT, PROXY, SHIM, SYSTEMD], WRITERS) == Owner(20, "kube-proxy")
    assert find_owner([NFT, process(25, "/bin/sh"), PROXY], WRITERS) == Owner(20, "kube-proxy")


def test_a_writer_works_for_itself() -> None:
    """calico-node writes by netlink of its own."""
    agent = process(40, "/bin/calico-node")
    assert find_owner([agent, SHIM], WRITERS) == Owner(40, "calico-node")


def test_all_of_a_service_works_for_its_first_process() -> None:
    """The class is told by the cgroup, in which every process of it is."""
    chain = [NFT, process(50, "/usr/bin/edge"), SYSTEMD]
    assert find_owner(chain, WRITERS, lambda _: "/system.slice/edge.service") == Owner(50, "edge")


def test_a_tool_without_a_class_works_for_its_parent() -> None:
    """The script that runs it, even if nothing is known of it; an orphan works for itself."""
    script = process(60, "/usr/bin/bash")
    assert find_owner([process(61, "/sbin/nft", 60), script], WRITERS) == Owner(60, "other")
    assert find_owner([process(61, "/sbin/iptables", 60)], WRITERS) == Owner(60, "other")
    assert find_owner([process(61, "/sbin/iptables", 1), SYSTEMD], WRITERS) == Owner(61, "other")
    assert find_owner([process(61, "/sbin/iptables", 0)], WRITERS) == Owner(61, "other")


def test_a_program_without_a_class_works_for_itself() -> None:
    """Its parent has nothing to do with what it writes."""
    assert find_owner([process(61, "/usr/bin/python3", 60), process(60, "/bin/bash")], WRITERS) == Owner(
        61, "other"
    )


def test_a_class_that_the_chains_told_is_taken() -> None:
    """Flannel in k3s: its tools are those of the one program."""
    k3s = process(70, "/usr/local/bin/k3s")
    tool = process(71, "/sbin/iptables", 70)
    assert find_owner([tool, k3s], WRITERS) == Owner(70, "kube-proxy")
    assert find_owner([tool, k3s], WRITERS, writer="flannel") == Owner(70, "flannel")
