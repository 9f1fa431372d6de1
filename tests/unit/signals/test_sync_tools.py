# SPDX-License-Identifier: Apache-2.0
"""What a command line says of a process."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.signals.sync_tools import Kind, Role, Tool, find_tool


def tool(command: str, executable: str = "") -> Tool | None:
    """The job of a command."""
    words = command.split()
    return find_tool(executable or f"/usr/sbin/{words[0].rpartition('/')[2]}", words[0][:15], words)


@pytest.mark.parametrize(
    ("command", "role", "family", "json"),
    [
        ("nft -f -", Role.WRITE, "", False),
        ("nft -f /etc/nftables.conf", Role.WRITE, "", False),
        ("nft -D a=b -f -", Role.WRITE, "", False),
        ("nft --define list=1 add table ip x", Role.WRITE, "", False),
        ("nft add rule ip x y counter", Role.WRITE, "", False),
        ("nft -j -f -", Role.WRITE, "", True),
        ("nft --check -f -", Role.DRY, "", False),
        ("nft -c -f -", Role.DRY, "", False),
        ("nft -cf -", Role.DRY, "", False),
        ("/usr/sbin/nft --json --terse list table ip kube-proxy", Role.LIST, "ipv4", True),
        ("nft -jt list table ip6 kube-proxy", Role.LIST, "ipv6", True),
        ("nft --json list map ip kube-proxy service-ips", Role.LIST, "ipv4", True),
        ("nft --json list chains ip6", Role.LIST, "ipv6", True),
        ("nft list ruleset inet", Role.LIST, "inet", False),
        ("nft list ruleset", Role.LIST, "", False),
        ("nft list table kube-proxy", Role.LIST, "", False),
        ("nft get element ip x y { 1.2.3.4 }", Role.LIST, "ipv4", False),
        ("nft --version", Role.NONE, "", False),
        ("nft monitor", Role.NONE, "", False),
        ("nft", Role.UNKNOWN, "", False),
    ],
)
def test_nft(command: str, role: Role, family: str, json: bool) -> None:
    """Reads, writes or tries; the family where the command line has it."""
    found = tool(command)
    assert found is not None
    assert found == Tool(Kind.NFT, role, family, json)


@pytest.mark.parametrize(
    ("command", "role", "family"),
    [
        ("iptables -w 5 -W 100000 -N KUBE-SERVICES -t nat", Role.CHANGE, "ipv4"),
        ("ip6tables -w 5 -C PREROUTING -t nat -j X", Role.CHECK, "ipv6"),
        ("iptables -t nat --insert PREROUTING -j X", Role.CHANGE, "ipv4"),
        ("iptables -S POSTROUTING -t nat", Role.CHECK, "ipv4"),
        ("iptables -D INPUT 1", Role.REMOVE, "ipv4"),
        ("iptables --version", Role.NONE, "ipv4"),
        ("iptables", Role.UNKNOWN, "ipv4"),
        ("iptables-save -t nat", Role.LIST, "ipv4"),
        ("ip6tables-nft-save", Role.LIST, "ipv6"),
        ("iptables-legacy-restore --noflush", Role.WRITE, "ipv4"),
        ("iptables-restore -w 5 --noflush --counters", Role.WRITE, "ipv4"),
        ("iptables-restore -w 5 -T nat --noflush", Role.TABLE, "ipv4"),
        ("iptables-restore --table=nat", Role.TABLE, "ipv4"),
        ("iptables-restore --test", Role.DRY, "ipv4"),
        ("iptables-restore --version", Role.NONE, "ipv4"),
    ],
)
def test_iptables(command: str, role: Role, family: str) -> None:
    """The name tells the family, the first command what is done."""
    assert tool(command) == Tool(Kind.IPTABLES, role, family)


@pytest.mark.parametrize(
    ("executable", "command", "role"),
    [
        ("/usr/sbin/xtables-nft-multi", "iptables-restore --noflush", Role.WRITE),
        ("/usr/sbin/xtables-legacy-multi", "/usr/sbin/ip6tables -w -C X", Role.CHECK),
        ("/usr/sbin/xtables-nft-multi", "xtables-nft-multi iptables-save -t nat", Role.LIST),
    ],
)
def test_one_executable_with_several_names(executable: str, command: str, role: Role) -> None:
    """The first or the second word tells which it is."""
    found = tool(command, executable)
    assert found is not None
    assert found.role is role


def test_the_kernels_name_tells_it_where_the_command_line_is_unknown() -> None:
    """It is cut at 15 characters."""
    multi = "/usr/sbin/xtables-nft-multi"
    assert find_tool(multi, "iptables-restor") == Tool(Kind.IPTABLES, Role.WRITE, "ipv4")
    assert find_tool(multi, "ip6tables-save") == Tool(Kind.IPTABLES, Role.LIST, "ipv6")
    assert find_tool(multi, "ip6tables-nft-r") == Tool(Kind.IPTABLES, Role.WRITE, "ipv6")
    assert find_tool("/usr/sbin/ip6tables") == Tool(Kind.IPTABLES, Role.UNKNOWN, "ipv6")


@pytest.mark.parametrize(
    "command", ["bash -c nft", "nftables-exporter", "iptables-apply", "nft -i", "ipset list", "arptables -L"]
)
def test_other_programs_are_no_tools(command: str) -> None:
    """Nor is one that people type into: it lives for hours."""
    assert tool(command) is None


def test_a_script_in_front_of_the_tool_has_its_arguments() -> None:
    """The kernel puts the interpreter before the script's path."""
    words = ("/bin/sh", "-e", "/usr/sbin/nft", "--json", "list", "table", "ip", "kube-proxy")
    assert find_tool("/usr/sbin/nft", "nft", words) == Tool(Kind.NFT, Role.LIST, "ipv4", json=True)
    words = ("/bin/sh", "/usr/sbin/iptables", "-w", "-N", "X")
    assert find_tool("/usr/sbin/iptables", "iptables", words) == Tool(Kind.IPTABLES, Role.CHANGE, "ipv4")


def test_one_argument_may_be_a_whole_command() -> None:
    """As people quote it."""
    found = find_tool("/sbin/nft", "nft", ("nft", "list table ip6 mine"))
    assert found == Tool(Kind.NFT, Role.LIST, "ipv6")


def test_a_cut_command_line_still_tells() -> None:
    """The bounded copy may end within a word."""
    assert tool("nft --json --terse list table ip kube-pr") == tool("nft --json --terse list table ip x")


@given(st.text(max_size=20), st.text(max_size=15), st.lists(st.text(max_size=10), max_size=6))
def test_no_command_line_harms(executable: str, comm: str, arguments: list[str]) -> None:
    """They come from anybody."""
    for name in (executable, "/sbin/nft", "/sbin/iptables", "/sbin/xtables-nft-multi"):
        find_tool(name, comm, arguments)
