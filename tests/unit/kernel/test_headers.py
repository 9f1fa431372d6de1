# SPDX-License-Identifier: Apache-2.0
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.kernel.btf import Btf, BtfError, BtfMissing, Kind, Member
from kptrace.kernel.headers import STRUCTS_HEADER, struct_definition, tree, version_code, write_tree
from kptrace.model.errors import UnsupportedError
from tests.unit.kernel.btf_blob import Blob

VMLINUX = Path("/sys/kernel/btf/vmlinux")
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


def stub(machine: str = "x86_64", structs: str = "") -> dict[str, str]:
    """A tree of this kernel version."""
    return tree(machine=machine, release="6.1.0-28-amd64", page_size=4096, structs=structs)


def run_c(folder: Path, text: str, *, run: bool = True) -> str:
    """Compile against a tree in the folder and run; warnings are errors."""
    (folder / "main.c").write_text(text)
    include = f"-I{folder / 'include'}"
    command = ["gcc", "-std=gnu11", "-Wall", "-Werror", include, "-o", folder / "main", folder / "main.c"]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    return subprocess.run([folder / "main"], check=True, capture_output=True, text=True).stdout if run else ""


@pytest.mark.parametrize(
    ("release", "version"),
    [
        ("6.18.44-fc-v595", (6, 18, 44)),
        ("6.1.0-28-amd64", (6, 1, 0)),
        ("6.8-rc4+", (6, 8, 0)),
        ("5.10", (5, 10, 0)),
        ("4.14.355-275.572.amzn2.x86_64", (4, 14, 255)),
        ("v6.12.1", (6, 12, 1)),
        ("custom-6.6.2", (6, 6, 2)),
        ("", (5, 10, 0)),
        ("unknown", (5, 10, 0)),
        ("20240101.1", (5, 10, 0)),
    ],
)
def test_release_strings_give_a_version(release: str, version: tuple[int, int, int]) -> None:
    """Distributions' suffixes are ignored, a patch level is capped, and nonsense gives a version that works."""
    major, minor, patch = version
    assert version_code(release) == (major << 16) + (minor << 8) + patch


@given(st.text())
def test_any_release_string_gives_a_version(release: str) -> None:
    """No release string raises, and none gives a number that C would not take."""
    assert 0 <= version_code(release) < 1 << 31


def test_every_header_that_is_included_is_there() -> None:
    """The tree needs nothing outside itself."""
    for machine in ("x86_64", "aarch64"):
        files = stub(machine)
        included = {name for text in files.values() for name in re.findall(r"#include <(.*)>", text)}
        assert {f"include/{name}" for name in included} <= files.keys()


def test_the_facts_of_the_machine_are_in_the_tree() -> None:
    """Page size and kernel version are those that were given."""
    files = tree(machine="aarch64", release="6.12.3", page_size=65536)
    assert "PAGE_SIZE 65536" in files["include/asm/page.h"]
    assert f"LINUX_VERSION_CODE {(6 << 16) + (12 << 8) + 3}\n" in files["include/linux/version.h"]
    assert "regs[31]" in files["include/linux/types.h"]
    assert "orig_ax" in stub()["include/linux/types.h"]


def test_an_unknown_machine_is_refused() -> None:
    """Registers are not guessed."""
    with pytest.raises(UnsupportedError, match="riscv64") as caught:
        stub("riscv64")
    assert caught.value.remedy == "run on aarch64 or x86_64"


def test_writing_twice_leaves_the_same_tree(tmp_path: Path) -> None:
    """The files on disk are those of `tree`, also after a second run."""
    for _ in range(2):
        write_tree(tmp_path, machine="x86_64", release="6.1.0-28-amd64", page_size=4096)
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.h")}
    assert found == stub()


@needs_gcc
@pytest.mark.parametrize(
    ("machine", "members"),
    [
        ("x86_64", {"di": 112, "ax": 80, "ip": 128, "sp": 152}),
        ("aarch64", {"regs[7]": 56, "sp": 248, "pc": 256}),
    ],
)
def test_registers_are_where_the_architecture_has_them(
    tmp_path: Path, machine: str, members: dict[str, int]
) -> None:
    """Offsets of pt_regs as user space is promised them; arm64's tree compiles here too."""
    write_tree(tmp_path, machine=machine, release="6.1", page_size=4096)
    checks = "".join(
        f'_Static_assert(__builtin_offsetof(struct pt_regs, {name}) == {at}, "{name}");\n'
        for name, at in members.items()
    )
    sizes = '_Static_assert(sizeof(u64) == 8 && sizeof(__be16) == 2 && sizeof(bool) == 1, "types");'
    versions = (
        '_Static_assert(LINUX_VERSION_CODE == KERNEL_VERSION(6, 1, 0) && PAGE_SIZE == 4096, "version");'
    )
    headers = "".join(f"#include <{name}.h>\n" for name in ("uapi/linux/ptrace", "linux/version", "asm/page"))
    run_c(tmp_path, f"{headers}{checks}{sizes}{versions}int main(void) {{ return 0; }}", run=False)


def awkward() -> Blob:
    """A structure with every shape that needs care: holes, bitfields, unions, arrays, foreign names, big numbers."""
    blob = Blob()
    number, long, byte = blob.integer("int", 4), blob.integer("long", 8), blob.integer("char", 1)
    boolean = blob.add(1, "_Bool", 1, tail=(4 << 24 | 8,))
    wide = blob.integer("__int128", 16)
    pointer = blob.add(2, "", 0)
    rows = blob.add(3, "", 0, tail=(blob.add(3, "", 0, tail=(number, number, 3)), number, 2))
    empty = blob.add(3, "", 0, tail=(byte, number, 0))
    union = blob.struct("", 28, [("short_arm", byte, 0), ("long_arm", rows, 0)], union=True)
    bits = blob.struct(
        "", 8, [("low", number, 3 << 24 | 2), ("high", number, 7 << 24 | 29), ("after", byte, 56)], flag=True
    )
    enum = blob.enum("colour", [("RED", 0)])
    prototype = blob.add(13, "", 0)
    blob.struct(
        "awkward",
        180,
        [
            ("flag", boolean, 8),
            ("unaligned", long, 24),
            ("", bits, 96),
            ("rows", rows, 160),
            ("wide", wide, 360),
            ("foreign<u8>", long, 488),
            ("colour", enum, 552),
            ("named", bits, 584),
            ("function", blob.add(2, "", prototype), 648),
            ("many", blob.add(3, "", 0, tail=(bits, number, 2)), 720),
            ("pointer", pointer, 856),
            ("", union, 1200),
            ("tail", empty, 1440),
        ],
    )
    return blob


def leaves(btf: Btf, type_id: int, prefix: str = "", base: int = 0) -> list[tuple[str, Member, int]]:
    """Every member that C can name, with its path and offset in bits."""
    found = []
    for member in btf.members(type_id):
        path, at = f"{prefix}{member.name}", base + member.bit_offset
        inner = btf.strip(member.type_id)
        if not re.fullmatch(r"\w*", member.name, re.ASCII):
            continue
        if member.name:
            found.append((path, member, at))
        if inner.kind in (Kind.STRUCT, Kind.UNION):
            found += leaves(btf, inner.id, f"{path}." if member.name else prefix, at)
    return found


def assert_layout(btf: Btf, name: str, folder: Path) -> int:
    """Compile the definition and compare its size and the place of every member, whose number is returned."""
    write_tree(folder, machine="x86_64", release="6.1", page_size=4096, structs=struct_definition(btf, name))
    members = leaves(btf, btf.struct_id(name))
    lines = [f"__attribute__((unused)) struct {name} it;", f'printf("size %zu\\n", sizeof(struct {name}));']
    for path, member, _ in members:
        if member.bits:
            lines.append(
                f"memset(&it, 0, sizeof(it)); it.{path} = (typeof(it.{path} + 0)) -1;"
                f'printf("{path} %d\\n", first_bit(&it, sizeof(it)));'
            )
        else:
            lines.append(f'printf("{path} %zu\\n", 8 * __builtin_offsetof(struct {name}, {path}));')
    helper = (
        "static __attribute__((unused)) int first_bit(const void *p, unsigned long n) { const unsigned char *c = p;"
        " for (unsigned long i = 0; i < 8 * n; i++) if (c[i / 8] >> i % 8 & 1) return i; return -1; }\n"
    )
    includes = (
        f"#include <{STRUCTS_HEADER}>\n"
        "int printf(const char *, ...);\nvoid *memset(void *, int, unsigned long);\n"
    )
    output = run_c(folder, f"{includes}{helper}int main(void) {{\n{chr(10).join(lines)}\nreturn 0; }}\n")
    assert output.splitlines() == [
        f"size {btf.size_of(btf.struct_id(name))}",
        *(f"{path} {at}" for path, _, at in members),
    ]
    return len(members)


@needs_gcc
def test_awkward_structures_keep_their_layout(tmp_path: Path) -> None:
    """Holes, unaligned members, bitfields, unions and foreign names leave everything else at its place."""
    btf = Btf.parse(awkward().pack())
    assert assert_layout(btf, "awkward", tmp_path) > 12
    assert "foreign" not in struct_definition(btf, "awkward")


@needs_gcc
@pytest.mark.skipif(not VMLINUX.exists(), reason="the running kernel has no BTF")
def test_kernel_structures_keep_their_layout(tmp_path: Path) -> None:
    """Every member of real structures is where BTF has it, by the C compiler's own offsetof."""
    btf = Btf.load(VMLINUX)
    for name, least in (
        ("nf_hook_state", 7),
        ("sk_buff", 100),
        ("nf_conn", 50),
        ("net", 300),
        ("task_struct", 300),
    ):
        assert assert_layout(btf, name, tmp_path) >= least


def test_corrupt_structures_are_refused() -> None:
    """Members beyond the size, overlaps and structures inside themselves end in an error."""
    blob = Blob()
    number = blob.integer("int", 4)
    blob.struct("beyond", 4, [("a", number, 8)])
    blob.struct("overlap", 8, [("a", number, 0), ("b", number, 16)])
    itself = blob.end_id
    blob.struct("itself", 8, [("a", itself, 0), ("b", itself, 0)], union=False)
    fan = blob.end_id
    blob.struct("", 8, [("a", fan, 0), ("b", fan, 0), ("c", fan, 0)], union=True)
    blob.struct("fan", 8, [("a", fan, 0)])
    blob.struct("Vec<u8>", 4, [("a", number, 0)])
    btf = Btf.parse(blob.pack())
    for name in ("beyond", "overlap", "itself", "fan", "Vec<u8>"):
        with pytest.raises(BtfError):
            struct_definition(btf, name)
    with pytest.raises(BtfMissing):
        struct_definition(btf, "absent")
