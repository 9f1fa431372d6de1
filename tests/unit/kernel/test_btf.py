# SPDX-License-Identifier: Apache-2.0
import contextlib
import hashlib
import random
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kptrace.kernel.btf import Btf, BtfError, BtfMissing, Kind
from kptrace.model.errors import KernelError
from tests.unit.kernel.btf_blob import Blob

VMLINUX = Path("/sys/kernel/btf/vmlinux")


def kernel_like() -> Blob:
    """A blob with the shapes that the kernel's structures have."""
    blob = Blob()
    number = blob.integer("int", 4)
    blob.integer("unsigned int", 4)
    blob.add(7, "net")  # FWD before STRUCT
    common = blob.struct("ns_common", 16, [("stashed", number, 0), ("inum", number, 64)])
    typedef = blob.add(8, "ns_common_t", blob.add(10, "", blob.add(9, "", common)))
    inner = blob.struct("", 8, [("first", number, 0), ("second", number, 32)])
    union = blob.struct("", 8, [("", inner, 0), ("whole", number, 0)], union=True)
    blob.struct("net", 64, [("count", number, 0), ("ns", typedef, 128), ("", union, 256)])
    flags = [
        ("plain", number, 0),
        ("a", number, 3 << 24 | 32),
        ("b", number, 5 << 24 | 35),
        ("end", number, 64),
    ]
    blob.struct("flags", 12, flags, flag=True)
    blob.enum("reason", [("NONE", 0), ("DROP", 12), ("LAST", 0xFFFFFFFF)])
    blob.enum("signed", [("MINUS", -5)], signed=True)
    blob.enum64("wide", [("WIDE", 1 << 40)])
    blob.enum64("wide_signed", [("WIDE_MINUS", -(1 << 40))], signed=True)
    blob.function("nft_do_chain", [("pkt", number), ("priv", number)])
    blob.function("printk", [("fmt", number), ("", 0)])
    blob.function("nothing", [])
    blob.function("net", [("dev", number)])
    return blob


@pytest.fixture
def btf() -> Btf:
    """The kernel-like blob, parsed."""
    return Btf.parse(kernel_like().pack())


def test_members_are_found_in_named_and_anonymous_parts(btf: Btf) -> None:
    """A path descends through typedefs and qualifiers, and anonymous members are looked through as in C."""
    assert btf.member_offset("net", "count") == 0
    assert btf.member_offset("net", "ns") == 16
    assert btf.member_offset("net", "ns.inum") == 24
    assert btf.member_offset("net", "second") == 36
    assert btf.member_offset("net", "whole") == 32
    assert btf.member_offset("ns_common_t", "inum") == 8


def test_bitfields_have_an_offset_in_bits_only(btf: Btf) -> None:
    """A bitfield's word holds its width too, and a byte offset is refused where it does not begin at a byte."""
    assert btf.member_offset_bits("flags", "b") == 35
    assert btf.member("flags", "b").bits == 5
    assert btf.member_offset("flags", "a") == 4
    assert btf.member_offset("flags", "end") == 8
    with pytest.raises(BtfError, match="bit 35"):
        btf.member_offset("flags", "b")


@pytest.mark.parametrize("path", ["", ".", "ns.", "none", "ns.none", "count.inum", "ns.inum.x"])
def test_a_member_that_is_not_there_is_missing(btf: Btf, path: str) -> None:
    """Every path that leads nowhere is `BtfMissing`, which names what was asked for."""
    with pytest.raises(BtfMissing) as caught:
        btf.member_offset("net", path)
    assert caught.value.name == f"net.{path}"


@pytest.mark.parametrize("name", ["", "absent", "et", "net\0", "\udcff"])
def test_a_name_that_is_not_there_is_missing(btf: Btf, name: str) -> None:
    """An unknown name is `BtfMissing`, a `LookupError` and a `KernelError`."""
    for ask in (btf.struct_id, btf.func_id, btf.enum_value, btf.function_sizes):
        with pytest.raises(BtfMissing) as caught:
            ask(name)
        assert isinstance(caught.value, LookupError)
        assert isinstance(caught.value, KernelError)


def test_kinds_of_one_name_are_told_apart(btf: Btf) -> None:
    """The structure, its forward declaration and a function may share a name."""
    ids = {kind: btf.type_id("net", kind) for kind in (Kind.FWD, Kind.STRUCT, Kind.FUNC)}
    assert len(set(ids.values())) == 3
    assert btf.struct_id("net") == ids[Kind.STRUCT]
    assert btf.func_id("net") == ids[Kind.FUNC]
    assert btf.type(btf.struct_id("net")).name == "net"
    assert btf.size_of(btf.struct_id("net")) == 64


def test_names_that_share_or_repeat_a_string_are_found() -> None:
    """A name may be the end of another string, and the string section may hold one name twice."""
    blob = Blob()
    number = blob.integer("unsigned int", 4)
    shared = blob.integer("int", 4)
    assert blob.strings.count(b"int\0") == 1
    blob.strings += b"sk_buff\0"
    blob.struct("other", 4, [("x", number, 0)])
    second = len(blob.strings)
    blob.strings += b"sk_buff\0"
    buff = blob.struct("other", 8, [("y", shared, 32)])
    blob.types = blob.types[:-24] + struct.pack("=I", second) + blob.types[-20:]
    btf = Btf.parse(blob.pack())
    assert btf.type_id("int", Kind.INT) == shared
    assert btf.struct_id("sk_buff") == buff
    assert btf.member_offset("sk_buff", "y") == 4


def test_the_first_of_several_structures_with_the_member_answers() -> None:
    """Same-named structures exist in real kernels; a member is searched in each of them in order."""
    blob = Blob()
    number = blob.integer("int", 4)
    first = blob.struct("twice", 4, [("a", number, 0)])
    blob.struct("twice", 8, [("a", number, 32), ("b", number, 0)])
    btf = Btf.parse(blob.pack())
    assert btf.struct_id("twice") == first
    assert btf.member_offset("twice", "a") == 0
    assert btf.member_offset("twice", "b") == 0


def test_enumerators_of_either_width_and_sign(btf: Btf) -> None:
    """An enumerator is found by its name in ENUM and ENUM64, and its sign is kept."""
    expected = {
        "DROP": 12,
        "LAST": 0xFFFFFFFF,
        "MINUS": -5,
        "WIDE": 1 << 40,
        "WIDE_MINUS": -(1 << 40),
        "NONE": 0,
    }
    assert {name: btf.enum_value(name) for name in expected} == expected


def test_a_contradicted_enumerator_is_not_guessed() -> None:
    """Two enums may repeat a value but not give the same name different values."""
    blob = Blob()
    blob.enum("one", [("SAME", 1), ("OTHER", 1)])
    blob.enum("two", [("SAME", 1), ("OTHER", 2)])
    btf = Btf.parse(blob.pack())
    assert btf.enum_value("SAME") == 1
    with pytest.raises(BtfError, match=r"OTHER has several values in this BTF: \[1, 2\]"):
        btf.enum_value("OTHER")


def test_functions_tell_their_parameters(btf: Btf) -> None:
    """The dots of a variadic function are no parameter."""
    assert [len(btf.function_sizes(name)) for name in ("nft_do_chain", "printk", "nothing")] == [2, 1, 0]


def test_what_parameters_point_to_is_told() -> None:
    """A structure's name through qualifiers, whether it is known or only declared; nothing for void and for numbers."""
    blob = Blob()
    number, void = blob.integer("int", 4), blob.add(2, "", 0)
    skb = blob.add(2, "", blob.add(10, "", blob.struct("sk_buff", 8, [])))
    declared = blob.add(2, "", blob.add(7, "xt_table"))
    alias = blob.add(8, "state_t", blob.add(2, "", blob.add(2, "", number)))
    blob.function("f", [("a", void), ("b", skb), ("c", declared), ("d", alias), ("e", number), ("", 0)])
    btf = Btf.parse(blob.pack())
    assert btf.function_pointers("f") == ("", "sk_buff", "xt_table", "", "")
    with pytest.raises(BtfMissing):
        btf.function_pointers("g")


def test_a_module_continues_its_base() -> None:
    """Ids and string offsets of a module's blob go on where the base's end; its own types come first."""
    base_blob = kernel_like()
    base = Btf.parse(base_blob.pack())
    module = Blob(base.end_id, len(base_blob.strings))
    module.strings = b""
    own = module.struct("nft_chain", 8, [("net", base.struct_id("net"), 0), ("seen", 1, 600)])
    func = module.function("nft_do_chain", [("x", 1)])
    # A name of the base's string section on a type of the module.
    module.types += struct.pack("=III", base_blob.string("inum"), 8 << 24, own)
    btf = Btf.parse(module.pack(), base)
    assert (btf.struct_id("nft_chain"), btf.func_id("nft_do_chain")) == (own, func)
    assert btf.member_offset("nft_chain", "net.ns.inum") == 24
    assert btf.member_offset("nft_chain", "seen") == 75
    assert len(btf.function_pointers("nft_do_chain")) == 1
    assert btf.struct_id("net") == base.struct_id("net")
    assert btf.enum_value("DROP") == 12
    assert btf.type_id("inum", Kind.TYPEDEF) == btf.end_id - 1
    assert btf.type(own).name == "nft_chain"


def test_the_digest_is_that_of_the_data() -> None:
    """The digest names the blob in caches."""
    data = kernel_like().pack()
    assert Btf.parse(data).digest == hashlib.sha256(data).hexdigest()


def test_cycles_end() -> None:
    """Types that refer to themselves end in an error or an absent member, never in an endless search."""
    blob = Blob()
    blob.add(8, "loop", 1)
    blob.struct("self", 8, [("", 2, 0), ("", 2, 0), ("", 3, 0), ("named", 2, 0)])
    blob.struct("", 8, [("", 2, 0), ("", 3, 0)])
    blob.add(3, "", 0, tail=(4, 1, 9))
    blob.struct("array", 8, [("a", 4, 0)])
    btf = Btf.parse(blob.pack())
    with pytest.raises(BtfError, match="never end"):
        btf.member_offset("loop", "x")
    with pytest.raises(BtfMissing):
        btf.member_offset("self", "absent")
    assert btf.member_offset("self", ".".join(["named"] * 500)) == 0
    with pytest.raises(BtfError, match="never ends"):
        btf.size_of(4)


def test_sizes_follow_c() -> None:
    """Arrays, pointers and typedefs have C's sizeof; a function has none."""
    blob = Blob()
    number = blob.integer("int", 4)
    pointer = blob.add(2, "", number)
    rows = blob.add(3, "", 0, tail=(blob.add(3, "", 0, tail=(number, number, 5)), number, 7))
    typedef = blob.add(8, "matrix", rows)
    function = blob.function("f", [])
    btf = Btf.parse(blob.pack())
    assert [btf.size_of(each) for each in (number, pointer, rows, typedef)] == [4, 8, 140, 140]
    for sizeless in (0, function):
        with pytest.raises(BtfError, match="has no size"):
            btf.size_of(sizeless)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut short"),
        (b"\x9f\xeb\x01", "cut short"),
        (bytes(24), "no BTF of this machine"),
        (struct.pack(">HBBIIIII", 0xEB9F, 1, 0, 24, 0, 0, 0, 0), "no BTF of this machine"),
        (struct.pack("=HBBIIIII", 0xEB9F, 2, 0, 24, 0, 0, 0, 0), "version 2"),
        (struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 8, 0, 0, 0, 0), "cut short"),
        (struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, 0xFFFFFFFC, 0, 1), "cut short"),
        (struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 2, 0, 0, 0) + b"\0\0", "whole words"),
        (Blob().pack(strings=b"\0abc"), "last string has no end"),
        (struct.pack("=HBBIIIII3I", 0xEB9F, 1, 0, 24, 0, 12, 0, 0, 0, 0, 0), "has no kind"),
        (struct.pack("=HBBIIIII3I", 0xEB9F, 1, 0, 24, 0, 12, 0, 0, 0, 31 << 24, 0), "unknown kind 31"),
        (
            struct.pack("=HBBIIIII3I", 0xEB9F, 1, 0, 24, 0, 12, 0, 0, 0, 4 << 24 | 9, 0),
            "last type is cut short",
        ),
        (struct.pack("=HBBIIIIII", 0xEB9F, 1, 0, 24, 0, 4, 0, 0, 0), "last type is cut short"),
    ],
)
def test_foreign_and_broken_data_is_refused(data: bytes, message: str) -> None:
    """What is no whole BTF of this machine is a `BtfError` that says why."""
    with pytest.raises(BtfError, match=message):
        Btf.parse(data)


def test_a_missing_file_tells_what_to_do(tmp_path: Path) -> None:
    """No BTF file is an error with its errno and a remedy."""
    with pytest.raises(BtfError, match="cannot read BTF") as caught:
        Btf.load(tmp_path / "vmlinux")
    assert caught.value.errno == 2
    assert "CONFIG_DEBUG_INFO_BTF" in caught.value.remedy


def interrogate(data: bytes) -> None:
    """Ask everything; whatever the data is, only `BtfError` may come out."""
    try:
        btf = Btf.parse(data)
    except BtfError:
        return
    for ask in (
        lambda: btf.member_offset("net", "ns.inum"),
        lambda: btf.member_offset("net", "second"),
        lambda: btf.member_offset_bits("flags", "b"),
        lambda: btf.size_of(btf.struct_id("net")),
        lambda: btf.enum_value("DROP"),
        lambda: btf.enum_value("WIDE"),
        lambda: btf.function_pointers("printk"),
        *(
            lambda each=each: (btf.size_of(each), btf.members(each))
            for each in range(min(btf.end_id + 1, 60))
        ),
    ):
        with contextlib.suppress(BtfError):
            ask()


@given(st.integers(0, 2000))
def test_truncated_data_never_escapes_as_another_error(length: int) -> None:
    """Cut anywhere, a blob is refused or answers."""
    interrogate(kernel_like().pack()[:length])


@given(st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 255)), min_size=1, max_size=12))
def test_mutated_data_never_escapes_as_another_error(changes: list[tuple[int, int]]) -> None:
    """With any bytes changed, a blob is refused or answers."""
    data = bytearray(kernel_like().pack())
    for at, value in changes:
        data[at % len(data)] = value
    interrogate(bytes(data))


@given(st.lists(st.integers(0, 0xFFFFFFFF) | st.integers(0, 40), max_size=60), st.binary(max_size=30))
def test_random_types_never_escape_as_another_error(words: list[int], strings: bytes) -> None:
    """A good header with anything behind it is refused or answers."""
    body = struct.pack(f"={len(words)}I", *words)
    strings = b"\0" + strings + b"net\0inum\0\0"
    interrogate(
        struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(body), len(body), len(strings)) + body + strings
    )


@pytest.mark.skipif(not VMLINUX.exists(), reason="the running kernel has no BTF")
@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 20_000))
def test_a_mutated_piece_of_a_real_blob_never_escapes_as_another_error(seed: int, count: int) -> None:
    """The head of the running kernel's types, with bytes changed at random, is refused or answers."""
    words, strings = _REAL.piece(count)
    chance = random.Random(seed)
    for _ in range(chance.randrange(1, 30)):
        words[chance.randrange(len(words))] = chance.choice((0, 1, 4, 255, chance.randrange(256)))
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(words), len(words), len(strings))
    interrogate(header + bytes(words) + strings)


class _Real:
    """The running kernel's blob, read when first asked."""

    def __init__(self) -> None:
        self._data = b""

    def piece(self, types: int) -> tuple[bytearray, bytes]:
        """So many bytes of its types (in whole words) and the beginning of its strings."""
        if not self._data:
            self._data = VMLINUX.read_bytes()
        _, _, _, header, type_off, type_len, str_off, _ = struct.unpack_from("=HBBIIIII", self._data)
        start = header + type_off
        strings = self._data[header + str_off :][: 1 << 16] + b"\0"
        return bytearray(self._data[start : start + min(types * 4, type_len)]), strings


_REAL = _Real()
