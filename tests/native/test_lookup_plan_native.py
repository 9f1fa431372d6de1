# SPDX-License-Identifier: Apache-2.0
import os
import struct
from collections.abc import Iterator

import pytest

from kptrace.experiments.netns import Namespace
from kptrace.kernel.attach import attach_netfilter
from kptrace.kernel.links import netfilter_links
from kptrace.kernel.load import AttachType, ProgramType, load_program
from kptrace.model.netfilter import Hook, IpFamily
from kptrace.signals.lookup_plan import Boundary, Plan, diff, plan
from tests.native.test_dataplanes_native import RULESET, installed, nft

ACCEPT = struct.pack("=BBhi", 0xB7, 0, 0, 1) + struct.pack("=BBhi", 0x95, 0, 0, 0)  # return NF_ACCEPT


def chain(name: str, hook: str, priority: int) -> str:
    """A filter chain as nft writes it."""
    return f"chain {name} {{ type filter hook {hook} priority {priority}; }}"


@pytest.fixture
def program() -> Iterator[int]:
    """A netfilter program that accepts every packet."""
    fd = load_program("kpt_test", ACCEPT, ProgramType.NETFILTER, AttachType.NETFILTER)
    yield fd
    os.close(fd)


class Linked:
    """Links of a plan, held until `close`."""

    def __init__(self, namespace: Namespace, program: int) -> None:
        self.namespace, self.program = namespace, program
        self.links: dict[Boundary, int] = {}

    def follow(self, old: Plan, new: Plan) -> None:
        """Make the links of one plan those of another, linking first wherever no priority is needed twice."""
        change = diff(old, new)
        taken = {(b.family, b.hook, b.priority) for b in change.remove}
        late = [b for b in change.add if (b.family, b.hook, b.priority) in taken]
        with self.namespace.enter():
            for boundary in (b for b in change.add if b not in late):
                self.link(boundary)
            for boundary in change.remove:
                os.close(self.links.pop(boundary))
            for boundary in late:
                self.link(boundary)
        assert set(self.links) == set(new.boundaries)

    def link(self, boundary: Boundary) -> None:
        """Link one."""
        nfproto = boundary.family.nfproto
        self.links[boundary] = attach_netfilter(self.program, nfproto, boundary.hook, boundary.priority)

    def close(self) -> None:
        """Unlink all."""
        while self.links:
            os.close(self.links.popitem()[1])


@pytest.fixture
def linked(namespace: Namespace, program: int) -> Iterator[Linked]:
    """Nothing linked yet."""
    links = Linked(namespace, program)
    yield links
    links.close()


def foreign(own: Linked) -> dict[tuple[IpFamily, int], set[int]]:
    """Priorities of all links but a plan's own."""
    mine = {(b.family.nfproto, b.hook, b.priority) for b in own.links}
    found: dict[tuple[IpFamily, int], set[int]] = {}
    for link in netfilter_links():
        if (link.nfproto, link.hook, link.priority) not in mine:
            family = IpFamily.IPV4 if link.nfproto == 2 else IpFamily.IPV6
            found.setdefault((family, link.hook), set()).add(link.priority)
    return found


def test_links_are_listed_while_they_live(namespace: Namespace, program: int) -> None:
    """A link appears with its family, hook and priority, and is gone when closed."""

    def listed() -> list[tuple[int, int, int]]:
        return [(each.nfproto, each.hook, each.priority) for each in netfilter_links()]

    with namespace.enter():
        fd = attach_netfilter(program, 10, Hook.FORWARD, -12345)
    assert listed().count((10, Hook.FORWARD, -12345)) == 1
    os.close(fd)
    assert (10, Hook.FORWARD, -12345) not in listed()


def test_the_kernel_takes_every_boundary_of_a_plan(namespace: Namespace, linked: Linked) -> None:
    """Nothing sits where the planner sees room: nft, legacy and NAT chains, conntrack, defragmentation."""
    nft(namespace, RULESET)
    namespace.run(["iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-j", "ACCEPT"])
    namespace.run(["iptables-legacy", "-t", "mangle", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "NEW"])
    near = chain("a", "output", -201) + chain("b", "output", -99) + chain("c", "input", 99)
    nft(namespace, f"table ip near {{ {near} }}")
    planned = plan(installed(namespace), foreign(linked))
    linked.follow(Plan((), ()), planned)
    assert not planned.omitted
    assert plan(installed(namespace), foreign(linked), linked.links) == planned


def test_the_kernel_takes_every_replan(namespace: Namespace, linked: Linked) -> None:
    """Chains come, also where our links are, and go; each time the difference can be linked and unlinked."""
    current = Plan((), ())
    for rules in (
        RULESET,
        "table ip fw2 {" + chain("a", "input", -111) + chain("b", "output", -99) + "}",
        "delete table inet fw",
        "table ip fw2 {" + chain("c", "output", -101) + "}",
        "delete table ip kube-proxy; delete table ip fw2",
        "flush ruleset",
    ):
        nft(namespace, rules)
        new = plan(installed(namespace), foreign(linked), linked.links)
        linked.follow(current, new)
        current = new
    assert current == Plan((), ())


def test_two_planners_share_a_namespace(namespace: Namespace, linked: Linked, program: int) -> None:
    """The second finds room beside the first, which then has no reason to move."""
    nft(namespace, RULESET)
    first = plan(installed(namespace), foreign(linked))
    linked.follow(Plan((), ()), first)
    second = Linked(namespace, program)
    try:
        theirs = plan(installed(namespace), foreign(second))
        second.follow(Plan((), ()), theirs)
        assert len(theirs.brackets) == len(first.brackets)
        assert plan(installed(namespace), foreign(linked), linked.links) == first
    finally:
        second.close()
