# SPDX-License-Identifier: Apache-2.0
"""The running kernel's BTF, against bpftool's reading of the same file."""

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from kptrace.kernel.btf import Btf

VMLINUX = Path("/sys/kernel/btf/vmlinux")
_TYPE = re.compile(r"^\[(\d+)\] (\w+) '([^']*)'.*?(?: size=(\d+))?", re.ASCII)
_MEMBER = re.compile(r"^\t'([^']*)' type_id=(\d+) bits_offset=(\d+)")


class Oracle:
    """bpftool's raw dump, read line by line."""

    def __init__(self, text: str) -> None:
        self.ids: dict[tuple[str, str], int] = {}
        self.members: dict[int, list[tuple[str, int, int]]] = {}
        self.enumerators = dict(re.findall(r"^\t'(\w+)' val=(-?\d+)", text, re.MULTILINE))
        current = 0
        for line in text.splitlines():
            if head := _TYPE.match(line):
                current = int(head[1])
                self.ids.setdefault((head[2], head[3]), current)
            elif member := _MEMBER.match(line):
                self.members.setdefault(current, []).append((member[1], int(member[2]), int(member[3])))

    def find(self, type_id: int, name: str) -> tuple[int, int] | None:
        """Type and bit offset of a member, anonymous ones looked through."""
        for member, member_type, bits in self.members.get(type_id, []):
            if member == name:
                return member_type, bits
            if member == "(anon)" and (inner := self.find(member_type, name)):
                return inner[0], bits + inner[1]
        return None

    def offset(self, path: str) -> int:
        """Bytes to a member."""
        name, *parts = path.split(".")
        current, total = self.ids["STRUCT", name], 0
        for part in parts:
            found = self.find(current, part)
            assert found, f"bpftool knows no {part} in {name}"
            current, total = found[0], total + found[1]
        return total // 8


@pytest.fixture(scope="module")
def btf() -> Btf:
    """The running kernel's BTF."""
    if not VMLINUX.exists():
        pytest.skip("the running kernel has no BTF")
    return Btf.load(VMLINUX)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    """The same file as bpftool reads it."""
    if not VMLINUX.exists() or shutil.which("bpftool") is None:
        pytest.skip("needs bpftool and the kernel's BTF")
    command = ["bpftool", "btf", "dump", "file", str(VMLINUX), "format", "raw"]
    return Oracle(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(
    "path",
    [
        "sk_buff._nfct",
        "sk_buff.protocol",
        "nf_conn.status",
        "net.ns.inum",
        "task_struct.nsproxy",
        "nsproxy.net_ns",
        "nf_hook_state.in",
        "net_device.ifindex",
    ],
)
def test_members_are_where_bpftool_says(btf: Btf, oracle: Oracle, path: str) -> None:
    """Offsets of the members that the programs follow equal bpftool's."""
    name, _, rest = path.partition(".")
    assert btf.member_offset(name, rest) == oracle.offset(path)


@pytest.mark.parametrize("name", ["bpf_dynptr_from_skb", "bpf_rdonly_cast", "ip_rcv"])
def test_functions_have_bpftools_ids(btf: Btf, oracle: Oracle, name: str) -> None:
    """Ids of functions and kfuncs equal bpftool's."""
    if ("FUNC", name) not in oracle.ids:
        pytest.skip(f"this kernel has no {name}")
    assert btf.func_id(name) == oracle.ids["FUNC", name]


def test_every_structure_has_bpftools_id(btf: Btf, oracle: Oracle) -> None:
    """A sample of all structures: each name leads to the id of its first type."""
    names = sorted(name for kind, name in oracle.ids if kind == "STRUCT" and name != "(anon)")
    assert len(names) > 1000
    for name in names[:: len(names) // 97]:
        assert btf.struct_id(name) == oracle.ids["STRUCT", name]


def test_the_drop_reason_has_bpftools_value(btf: Btf, oracle: Oracle) -> None:
    """The enumerator's value equals bpftool's."""
    name = "SKB_DROP_REASON_NETFILTER_DROP"
    assert btf.enum_value(name) == int(oracle.enumerators[name])


def test_indexing_is_fast_enough_for_every_start() -> None:
    """The best of five passes over the whole blob takes less than 0.4 s of CPU time."""
    if not VMLINUX.exists():
        pytest.skip("the running kernel has no BTF")
    data, spent = VMLINUX.read_bytes(), []
    for _ in range(5):
        started = time.process_time()
        Btf.parse(data)
        spent.append(time.process_time() - started)
    assert min(spent) < 0.4
