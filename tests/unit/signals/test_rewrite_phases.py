# SPDX-License-Identifier: Apache-2.0
"""The phases of rewrites: their records, what is counted of them, and how modules that come and go are followed."""

import errno
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.kernel.functions import Function
from kptrace.kernel.host import Host
from kptrace.model.errors import KernelError
from kptrace.model.metrics import HistogramSample
from kptrace.signals import rewrite_phases_follow
from kptrace.signals.rewrite_phases_follow import PhasesFollower
from kptrace.signals.rewrite_phases_kernel import (
    HOOKS,
    LOST_REASONS,
    Hole,
    Holes,
    Hook,
    Mechanism,
    destroy_holes,
)
from kptrace.signals.rewrite_phases_records import HEAD_BYTES, PHASES, Flag, Kind, Phases, decode
from kptrace.signals.rewrite_phases_reduce import MAX_SENDERS, PhaseCounts
from tests.unit.c_layout import BPF, numbers, run
from tests.unit.dataplanes.wire import batch, name, nft

HEADER = "kptrace/rewrite_phases.h"
NEWTABLE, NEWRULE = 0, 6
KUBE_PROXY = batch(nft(NEWTABLE, name(1, "kube-proxy")))
FILTER = batch(nft(NEWRULE, name(1, "filter"), name(2, "OUTPUT")))
BATCH = Phases(
    kind=Kind.BATCH,
    flags=Flag.COMMITTED,
    tgid=10,
    portid=77,
    begin_ns=1000,
    end_ns=9000,
    mark_ns=0,
    inner_ns=3000,
    abort_ns=0,
    size=len(KUBE_PROXY),
    head=KUBE_PROXY,
)
REPLACE = replace(
    BATCH, kind=Kind.REPLACE, flags=Flag.REPLACED, portid=0, mark_ns=5000, inner_ns=1500, size=0, head=b""
)
TEARDOWN = replace(BATCH, kind=Kind.TEARDOWN, flags=Flag(0), inner_ns=0, size=0, head=b"")
DESTROY = replace(TEARDOWN, kind=Kind.DESTROY, portid=0)


def counted(*records: Phases) -> dict[tuple[str, str], tuple[int, int]]:
    """Number and nanoseconds by data plane and phase."""
    counts = PhaseCounts()
    for record in records:
        counts.apply(record)
    return shown(counts)


def shown(counts: PhaseCounts) -> dict[tuple[str, str], tuple[int, int]]:
    """What was counted."""
    return {
        (sample.labels[0], sample.labels[1]): (sample.count, round(sample.sum * 1e9))
        for family in counts.families()
        for sample in family.samples
        if isinstance(sample, HistogramSample)
    }


def test_a_record_is_read_as_c_writes_it(tmp_path: Path) -> None:
    """Every member of C's structure arrives under its own name, and the batch's bytes behind it."""
    made = run(
        tmp_path,
        HEADER,
        "struct phases_record it = { { .kind = KIND_BATCH, .flags = FLAG_ABORTED | FLAG_COMMITTED, .tgid = 2, .portid = 3,"
        " .begin_ns = 4, .end_ns = 5, .mark_ns = 6, .commit_ns = 7, .abort_ns = 8, .runs = 9, .message = 9, .size = 10 },"
        " { 0x0706050403020100, 0x0f0e0d0c0b0a0908 } }; dump(it);",
    )
    both = Flag.COMMITTED | Flag.ABORTED
    assert decode(made) == Phases(Kind.BATCH, both, 2, 3, 4, 5, 6, 7, 8, 10, bytes(range(10)))
    assert decode(made[: PHASES.size - 1]) is None
    assert decode(b"\x09" + made[1:]) is None


def test_sizes_and_constants_are_the_headers(tmp_path: Path) -> None:
    """Python's formats and numbers are the compiler's."""
    expected = {
        "sizeof(struct phases)": PHASES.size,
        "sizeof(struct phases_record)": PHASES.size + HEAD_BYTES,
        **{f"KIND_{kind.name}": kind.value for kind in Kind},
        **{f"FLAG_{flag.name}": flag.value for flag in Flag},
        **{f"LOST_{reason.upper()}": n for n, reason in enumerate(LOST_REASONS)},
    }
    assert numbers(tmp_path, HEADER, *expected) == expected


def test_holes_have_the_order_of_the_source() -> None:
    """The loader fills in what the source means, and every program of the table is there."""
    text = (BPF / "rewrite_phases.bpf.c").read_text()
    names = text.partition("enum {")[2].partition("}")[0].replace(" ", "").split(",")
    assert names == [hole.name for hole in Hole]
    for hook in HOOKS:
        assert f"int {hook.stem}_enter(u64 *ctx)" in text
        assert f"int {hook.stem}_leave(u64 *ctx)" in text


@given(st.binary(max_size=PHASES.size + 300))
def test_any_bytes_are_counted_or_refused(data: bytes) -> None:
    """Nothing is raised, whatever the kernel side or a batch says."""
    for each in (data, b"\x01\0\0\0\x03\0\0\0" + data):
        record = decode(each)
        if record is not None:
            PhaseCounts().apply(record)


def test_a_batchs_phases_add_up() -> None:
    """Parse is what is left of the whole run, so nothing is counted twice."""
    assert counted(BATCH) == {("nftables", "parse"): (1, 5000), ("nftables", "commit"): (1, 3000)}
    aborted = replace(BATCH, flags=Flag.ABORTED, inner_ns=0, abort_ns=2000)
    assert counted(aborted) == {("nftables", "parse"): (1, 6000), ("nftables", "abort"): (1, 2000)}
    again = replace(BATCH, flags=Flag.ABORTED | Flag.COMMITTED, abort_ns=1000)
    assert counted(again) == {
        ("nftables", "parse"): (1, 4000),
        ("nftables", "abort"): (1, 1000),
        ("nftables", "commit"): (1, 3000),
    }


def test_a_batch_without_its_end_is_unpaired() -> None:
    """Where neither commit nor abort was seen, no time is called parse: nf_tables was being loaded just then."""
    counts = PhaseCounts()
    counts.apply(replace(BATCH, flags=Flag(0), inner_ns=0))
    assert shown(counts) == {}
    assert counts.unpaired == 1


@pytest.mark.parametrize(
    ("head", "size", "plane"),
    [
        (KUBE_PROXY, len(KUBE_PROXY), "nftables"),
        (FILTER, len(FILTER), "iptables-nft"),
        (FILTER + bytes(200), 10_000, "iptables-nft"),
        (batch(), len(batch()), "nftables"),
        (
            batch(nft(NEWTABLE, name(1, "nat")), nft(NEWTABLE, name(1, "mine"))),
            200,
            "other",
        ),
    ],
)
def test_the_data_plane_is_told_by_the_tables_name(head: bytes, size: int, plane: str) -> None:
    """The first bytes of a batch have the name of its table."""
    assert {each for each, _ in counted(replace(BATCH, head=head, size=size))} == {plane}


def test_what_follows_a_commit_has_its_data_plane() -> None:
    """A close belongs to the socket's last batch, a destroy to all commits since the one before."""
    nft = replace(BATCH, head=FILTER, size=len(FILTER), portid=78)
    found = counted(nft, DESTROY, BATCH, replace(TEARDOWN, portid=78), TEARDOWN)
    assert found["iptables-nft", "destroy"] == (1, 8000)
    assert found["iptables-nft", "teardown"] == (1, 8000) == found["nftables", "teardown"]
    assert counted(nft, BATCH, DESTROY)["other", "destroy"] == (1, 8000)
    aborted = replace(nft, flags=Flag.ABORTED)
    assert counted(BATCH, aborted, DESTROY)["nftables", "destroy"] == (1, 8000)
    assert counted(TEARDOWN) == {("other", "teardown"): (1, 8000)}


def test_a_replacements_phases_add_up() -> None:
    """Before, in and after xt_replace_table; a refused table has only the first."""
    plane = "iptables-legacy"
    assert counted(REPLACE) == {
        (plane, "parse"): (1, 4000),
        (plane, "replace"): (1, 1500),
        (plane, "counters"): (1, 2500),
    }
    assert counted(replace(REPLACE, flags=Flag.REFUSED)) == {(plane, "parse"): (1, 8000)}
    assert counted(replace(REPLACE, flags=Flag(0))) == {}


def test_senders_are_bounded() -> None:
    """However many sockets are never closed, their number is bounded."""
    counts = PhaseCounts()
    for portid in range(2 * MAX_SENDERS):
        counts.apply(replace(BATCH, portid=portid))
    assert len(counts._senders) == MAX_SENDERS


class Kernel:
    """Records what is attached; refuses what it is told to."""

    mechanism: Mechanism = "fentry"

    def __init__(self) -> None:
        self.attached: list[str] = []
        self.errors: dict[str, KernelError] = {}

    def attach(self, hook: Hook, function: Function, holes: Holes) -> None:
        """Attach, or raise."""
        assert not any(holes.values())
        assert function.name == hook.function
        if hook.function in self.errors:
            raise self.errors[hook.function]
        self.attached.append(hook.function)

    def detach(self, hook: Hook) -> None:
        """Detach."""
        if hook.function in self.attached:
            self.attached.remove(hook.function)


class Types:
    """A BTF with some functions."""

    loaded = 0
    functions: Iterable[str] = ()

    def func_id(self, name: str) -> int:
        """Its number."""
        if name not in self.functions:
            raise rewrite_phases_follow.BtfMissing(name, "function")
        return 5

    def function_sizes(self, name: str) -> tuple[int, ...]:
        """Sizes of its parameters."""
        self.func_id(name)
        return (8, 4, 16, 4)

    def member_offset(self, name: str, path: str) -> int:
        """Offset of a member."""
        raise rewrite_phases_follow.BtfMissing(f"{name}.{path}", "member")

    @classmethod
    def load(cls, _path: Path, _base: "Types | None" = None) -> "Types":
        """One for everybody."""
        Types.loaded += 1
        return cls()


@pytest.fixture
def types(monkeypatch: pytest.MonkeyPatch) -> type[Types]:
    """The BTF is made up."""
    monkeypatch.setattr(rewrite_phases_follow, "Btf", Types)
    monkeypatch.setattr(Types, "functions", ())
    monkeypatch.setattr(Types, "loaded", 0)
    return Types


def module(root: Path, name: str, state: str = "live") -> Path:
    """A module in sysfs."""
    folder = root / "module" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "initstate").write_text(state + "\n")
    return folder


def follower(tmp_path: Path) -> tuple[Kernel, PhasesFollower]:
    """A follower on a made-up host."""
    kernel = Kernel()
    return kernel, PhasesFollower(kernel, Host(sys=tmp_path))  # type: ignore[arg-type]


def test_what_is_built_in_is_attached_at_once(types: type[Types], tmp_path: Path) -> None:
    """Inner functions come first; BTF is read once, however often it ticks."""
    types.functions = [hook.function for hook in HOOKS]
    kernel, following = follower(tmp_path)
    for _ in range(3):
        following.tick()
    assert kernel.attached == [hook.function for hook in HOOKS]
    assert following.missing == frozenset()
    assert types.loaded == 1


def test_modules_are_followed(types: type[Types], tmp_path: Path) -> None:
    """A module that comes is attached to, one that went is let go, one that came again is attached to again."""
    kernel, following = follower(tmp_path)
    following.tick()
    assert kernel.attached == []
    types.functions = [hook.function for hook in HOOKS]
    folder = module(tmp_path, "x_tables", "coming")
    following.tick()
    assert kernel.attached == []
    module(tmp_path, "x_tables")
    following.tick()
    assert kernel.attached == ["xt_replace_table"]
    for path in (folder / "initstate", folder):
        path.unlink() if path.is_file() else path.rmdir()
    following.tick()
    assert kernel.attached == []
    assert following.attached == {}
    module(tmp_path, "x_tables")
    following.tick()
    assert kernel.attached == ["xt_replace_table"]


def test_there_is_something_to_do_only_when_modules_move(types: type[Types], tmp_path: Path) -> None:
    """Asking is free of the BTF: true before the first look and after a module came or went, else false."""
    kernel, following = follower(tmp_path)
    kernel.mechanism = "fentry"
    assert following.due()
    following.tick()
    assert not following.due()
    types.functions = [hook.function for hook in HOOKS]
    folder = module(tmp_path, "x_tables")
    assert following.due()
    following.tick()
    assert not following.due()
    assert following.pinned() == ("x_tables",)
    kernel.mechanism = "kprobe"
    assert following.pinned() == ()
    for path in (folder / "initstate", folder):
        path.unlink() if path.is_file() else path.rmdir()
    assert following.due()
    following.tick()
    assert not following.due()


def test_what_is_missing_or_refused_is_told_apart(types: type[Types], tmp_path: Path) -> None:
    """A function that the module has not is no refusal, by BTF or by a kprobe's errno; each is tried once."""
    types.functions = ["nf_tables_commit", "nf_tables_abort", "nf_tables_trans_destroy_work"]
    kernel, following = follower(tmp_path)
    kernel.errors = {
        "nf_tables_abort": KernelError("no", errno=errno.EPERM),
        "nf_tables_trans_destroy_work": KernelError("no", errno=errno.ENOENT),
    }
    module(tmp_path, "nf_tables")
    following.tick()
    following.tick()
    assert kernel.attached == ["nf_tables_commit"]
    assert [hook.function for hook in following.refused] == ["nf_tables_abort"]
    assert following.names(following.missing) == "nf_tables_trans_destroy_work, nft_rcv_nl_event"


def test_what_may_still_come_is_no_reason_to_give_up(types: type[Types], tmp_path: Path) -> None:
    """Modules may come where they have BTF; before v5.11 they have none, and fentry will never find them."""
    kernel, following = follower(tmp_path)
    (tmp_path / "kernel/btf").mkdir(parents=True)
    (tmp_path / "kernel/btf/vmlinux").touch()
    following.tick()
    assert following.hopeless() == ""
    module(tmp_path, "ext4")
    assert following.hopeless() == "the module ext4 has no BTF"
    (tmp_path / "kernel/btf/ext4").touch()
    assert following.hopeless() == ""
    module(tmp_path, "x_tables")
    following.tick()
    assert following.hopeless() == "not to be found: xt_replace_table"
    types.functions = ["xt_replace_table"]
    kernel.errors = {"xt_replace_table": KernelError("EPERM")}
    following = PhasesFollower(kernel, Host(sys=tmp_path))  # type: ignore[arg-type]
    following.tick()
    assert following.hopeless() == "EPERM"


def test_the_worker_of_each_namespace_is_known_by_its_structure() -> None:
    """Where the work is in the namespace's own structure, the run's namespace is read from what it takes out."""

    class Newer(Types):
        def member_offset(self, name: str, path: str) -> int:
            """Offset of a member."""
            offsets = {
                ("nftables_pernet", "destroy_work"): 200,
                ("nftables_pernet", "destroy_list"): 32,
                ("nft_trans", "net"): 24,
                ("nft_trans", "list"): 8,
            }
            return offsets[name, path]

    expected = {Hole.WORK_PER_NET: 1, Hole.NET_WORK: 200, Hole.NET_DESTROYED: 32, Hole.TRANS_NET: 16}
    assert destroy_holes(Newer()) == expected  # type: ignore[arg-type]
    assert set(destroy_holes(Types()).values()) == {0}  # type: ignore[arg-type]


def test_a_structure_by_value_takes_its_own_room(types: type[Types]) -> None:
    """What a function returns is behind all words of its arguments, of which a 16-byte structure has two."""
    from kptrace.kernel.functions import describe
    from kptrace.kernel.registers import registers

    types.functions = ["do_ipt_set_ctl"]
    found = describe(Types(), "do_ipt_set_ctl", "ip_tables", None)  # type: ignore[arg-type]
    assert (found.arguments, found.result) == ((0, 8, 16, 32), 40)
    layout = registers("x86_64")
    by_register = describe(Types(), "anything", "", layout)  # type: ignore[arg-type]
    assert by_register == Function("anything", "", 0, layout.arguments, layout.result)
