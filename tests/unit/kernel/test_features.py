# SPDX-License-Identifier: Apache-2.0
import errno
import gzip
import struct
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from kptrace.kernel import probes
from kptrace.kernel.capabilities import Capability, effective_capabilities, missing_capabilities
from kptrace.kernel.features import TABLE, Feature, Features, State, Support, probe
from kptrace.kernel.host import Host
from kptrace.kernel.load import ProgramType
from kptrace.kernel.support import Calls, Context
from kptrace.kernel.syscall import Command
from kptrace.model.errors import KernelError, UnsupportedError
from tests.unit.kernel.btf_blob import Blob

ALL = sum(1 << each for each in Capability)


@dataclass
class FakeKernel:
    """Answers every call by a new descriptor, or refuses it with the errno that is set for it."""

    refuse: dict[object, int] = field(default_factory=dict)
    tracefs: str = "private mount"
    open: set[int] = field(default_factory=set)
    made: list[object] = field(default_factory=list)

    def _answer(self, what: object) -> int:
        self.made.append(what)
        if code := self.refuse.get(what, 0):
            raise KernelError(f"{what}: {errno.errorcode[code]}", errno=code)
        fd = 100 + len(self.made)
        self.open.add(fd)
        return fd

    def load(self, _code: bytes, kind: ProgramType, *_arguments: int) -> int:
        """Refused by the program type's name."""
        return self._answer(kind.name)

    def bpf(self, command: int, attr: bytes) -> int:
        """Refused by the command, a new map by the command and its type."""
        return self._answer((command, struct.unpack_from("<I", attr)[0]) if command == 0 else command)

    def open_kprobe(self, _pmu: int, function: str) -> int:
        """Refused by the function's name."""
        return self._answer(function)

    def find_tracefs(self, _host: Host) -> str:
        """Where the fake has tracefs."""
        if not self.tracefs:
            raise UnsupportedError("tracefs is not mounted")
        return self.tracefs

    def calls(self) -> Calls:
        """The calls as probes take them; closing what is not open is an error."""
        return Calls(self.load, self.bpf, self.open_kprobe, self.find_tracefs, self.open.remove)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host whose kernel has everything and whose process may do everything."""
    host = Host(proc=tmp_path / "proc", sys=tmp_path / "sys")
    blob = Blob()
    for name in ("bpf_dynptr_from_skb", "bpf_rdonly_cast", "ip_rcv"):
        blob.function(name, [])
    pmu = host.sys / "bus/event_source/devices/kprobe/type"
    for path in (host.vmlinux_btf, host.lockdown, host.kconfig, host.proc / "self/status", pmu):
        path.parent.mkdir(parents=True, exist_ok=True)
    host.vmlinux_btf.write_bytes(blob.pack())
    host.lockdown.write_text("none [integrity] confidentiality\n")
    host.kconfig.write_bytes(
        gzip.compress(b"CONFIG_KPROBES=y\n# CONFIG_FPROBE is not set\nCONFIG_KPROBES_ON_FTRACE=y\n")
    )
    pmu.write_text("8\n")
    write_capabilities(host, ALL)
    return host


def write_capabilities(host: Host, mask: int) -> None:
    """Give the process these capabilities."""
    (host.proc / "self/status").write_text(f"Name:\tx\nCapPrm:\t{0:016x}\nCapEff:\t{mask:016x}\n")


def run(host: Host, kernel: FakeKernel) -> Features:
    """Probe everything on the fake; no probe may leave a descriptor open."""
    features = probe(host, calls=kernel.calls())
    assert not kernel.open
    return features


def test_a_kernel_with_everything_supports_the_whole_table(host: Host) -> None:
    """Each feature is supported, and nothing that was made for a probe is left."""
    features = run(host, FakeKernel())
    assert {name for name, support in features.items() if not support.supported} == set()
    assert list(features) == [feature.name for feature in TABLE]
    assert features.supported("netfilter_link", "fentry", "kprobe")
    assert features.lockdown == "lockdown: none [integrity] confidentiality"
    assert features["tracepoint"].detail == "tracefs: private mount"


def test_a_refused_priority_proves_netfilter_links(host: Host) -> None:
    """ERANGE is what a kernel with netfilter links says to an impossible priority."""
    features = run(host, FakeKernel({Command.LINK_CREATE: errno.ERANGE}))
    assert features["netfilter_link"].supported


@pytest.mark.parametrize(
    ("refused", "code", "state", "reason"),
    [
        (Command.LINK_CREATE, errno.EOPNOTSUPP, State.UNSUPPORTED, "link_refused"),
        (Command.LINK_CREATE, errno.EINVAL, State.UNSUPPORTED, "link_refused"),
        (ProgramType.NETFILTER.name, errno.EINVAL, State.UNSUPPORTED, "load_refused"),
        (ProgramType.NETFILTER.name, errno.EPERM, State.UNSUPPORTED, "load_refused"),
        (ProgramType.NETFILTER.name, errno.ENOSYS, State.UNSUPPORTED, "no_syscall"),
        (ProgramType.NETFILTER.name, errno.ENOMEM, State.INCONCLUSIVE, "probe_failed"),
    ],
)
def test_a_refused_netfilter_link_tells_step_and_errno(
    host: Host, refused: object, code: int, state: State, reason: str
) -> None:
    """The reason is the step that was refused and the detail has the errno; passing trouble is inconclusive."""
    support = run(host, FakeKernel({refused: code}))["netfilter_link"]
    assert (support.state, support.reason) == (state, reason)
    assert errno.errorcode[code] in support.detail


def test_eperm_without_the_capability_says_nothing_of_the_kernel(host: Host) -> None:
    """A refusal for lack of privilege is inconclusive and names what is missing."""
    write_capabilities(host, ALL & ~(1 << Capability.NET_ADMIN))
    support = run(host, FakeKernel({ProgramType.NETFILTER.name: errno.EPERM}))["netfilter_link"]
    assert (support.state, support.reason) == (State.INCONCLUSIVE, "missing_capability")
    assert support.detail.endswith("missing: CAP_NET_ADMIN")


def test_a_refused_tracing_program_shows_what_was_seen(host: Host) -> None:
    """Function, errno and the lockdown file as it reads, not a guess which of them is the cause."""
    support = run(host, FakeKernel({ProgramType.TRACING.name: errno.EPERM}))["fentry"]
    assert (support.state, support.reason) == (State.UNSUPPORTED, "load_refused")
    assert "ip_rcv" in support.detail
    assert "EPERM" in support.detail
    assert support.detail.endswith("lockdown: none [integrity] confidentiality")


def test_a_refused_trampoline_is_told_apart_from_a_refused_program(host: Host) -> None:
    """A tracing program that loads but does not attach is no support."""
    support = run(host, FakeKernel({Command.RAW_TRACEPOINT_OPEN: errno.EOPNOTSUPP}))["fentry"]
    assert (support.state, support.reason) == (State.UNSUPPORTED, "attach_refused")


def test_no_kprobe_device_is_reported_with_the_configuration(host: Host) -> None:
    """Without the PMU nothing is tried; the option is quoted as it stands."""
    (host.sys / "bus/event_source/devices/kprobe/type").unlink()
    host.kconfig.write_bytes(gzip.compress(b"CONFIG_KPROBES_ON_FTRACE=y\n# CONFIG_KPROBES is not set\n"))
    kernel = FakeKernel()
    support = run(host, kernel)["kprobe"]
    assert (support.state, support.reason) == (State.UNSUPPORTED, "no_kprobe_pmu")
    assert "ENOENT" in support.detail
    assert support.detail.endswith("CONFIG_KPROBES is not set")
    assert "ip_rcv" not in kernel.made


@pytest.mark.parametrize(
    "content", [None, b"", b"no gzip", gzip.compress(b"CONFIG_NET=y\n" * 99)[:-9], gzip.compress(b"")]
)
def test_an_unreadable_configuration_is_said_to_be(host: Host, content: bytes | None) -> None:
    """A missing, damaged or empty configuration is told as such, never taken as an answer."""
    host.kconfig.unlink()
    if content is not None:
        host.kconfig.write_bytes(content)
    seen = Context(host).kconfig("CONFIG_KPROBES")
    assert seen.startswith("CONFIG_KPROBES")
    assert str(host.kconfig) in seen


def test_kprobes_go_on_to_a_function_that_exists(host: Host) -> None:
    """ENOENT is about one function; only when none exists the probe cannot tell."""
    missing = {"bpf_fentry_test1": errno.ENOENT, "nft_do_chain": errno.ENOENT}
    assert run(host, FakeKernel(missing))["kprobe"].supported
    support = run(host, FakeKernel({**missing, "ip_rcv": errno.ENOENT}))["kprobe"]
    assert (support.state, support.reason) == (State.INCONCLUSIVE, "no_symbol")
    refused = run(host, FakeKernel({"bpf_fentry_test1": errno.EPERM}))["kprobe"]
    assert (refused.state, refused.reason) == (State.UNSUPPORTED, "attach_refused")
    assert refused.detail.endswith("CONFIG_KPROBES=y")


def test_no_btf_takes_everything_that_needs_it(host: Host) -> None:
    """Each such feature says that there is no BTF, and the rest is unharmed."""
    host.vmlinux_btf.unlink()
    features = run(host, FakeKernel())
    without = {name for name, support in features.items() if support.reason == "no_btf"}
    assert without == {"btf_vmlinux", "kfunc_dynptr_from_skb", "kfunc_rdonly_cast", "fentry"}
    assert features.supported("netfilter_link", "kprobe")


def test_modules_without_btf_are_no_support(host: Host) -> None:
    """Loaded modules of which none has BTF; without modules nothing is lacking."""
    assert run(host, FakeKernel())["btf_modules"].supported
    for name in ("nf_tables", "veth"):
        (host.sys / "module" / name).mkdir(parents=True)
        (host.sys / "module" / name / "initstate").write_text("live\n")
    support = run(host, FakeKernel())["btf_modules"]
    assert (support.state, support.reason) == (State.UNSUPPORTED, "no_module_btf")
    assert "2 modules" in support.detail
    host.module_btf("veth").touch()
    assert run(host, FakeKernel())["btf_modules"].detail == "1 of 2 loaded modules have it"


def test_pointers_are_followed_by_helper_or_by_cast(host: Host) -> None:
    """A lockdown refuses the helper; a kernel that has the cast does without."""
    kernel = FakeKernel({ProgramType.RAW_TRACEPOINT.name: errno.EINVAL})
    assert run(host, kernel)["follow_pointers"] == Support.yes("by bpf_rdonly_cast only")
    blob = Blob()
    blob.function("ip_rcv", [])
    host.vmlinux_btf.write_bytes(blob.pack())
    support = run(host, kernel)["follow_pointers"]
    assert (support.state, support.reason) == (State.UNSUPPORTED, "load_refused")
    assert support.detail.endswith("lockdown: none [integrity] confidentiality")


def test_missing_functions_are_named(host: Host) -> None:
    """A kfunc that the BTF does not have is unsupported; no function to trace leaves fentry open."""
    blob = Blob()
    blob.function("other", [])
    host.vmlinux_btf.write_bytes(blob.pack())
    features = run(host, FakeKernel())
    assert features["kfunc_rdonly_cast"].reason == "no_symbol"
    assert "bpf_rdonly_cast" in features["kfunc_rdonly_cast"].detail
    assert features["fentry"].state is State.INCONCLUSIVE


def test_maps_are_told_apart(host: Host) -> None:
    """A kernel may have arrays and no ring buffer."""
    features = run(host, FakeKernel({(Command.MAP_CREATE, 27): errno.EINVAL}))
    assert features["ring_buffer"].reason == "map_refused"
    assert features.supported("bpf_syscall", "mmapable_array")


def test_run_statistics_may_be_refused_alone(host: Host) -> None:
    """The call came later than the rest, and nothing is left switched on."""
    kernel = FakeKernel({Command.ENABLE_STATS: errno.EINVAL})
    support = run(host, kernel)["run_statistics"]
    assert (support.state, support.reason) == (State.UNSUPPORTED, "enable_stats_refused")
    kernel = FakeKernel()
    assert run(host, kernel).supported("run_statistics")
    assert not kernel.open


def test_no_bpf_at_all_is_no_syscall(host: Host) -> None:
    """ENOSYS is the system call's absence."""
    assert (
        run(host, FakeKernel({(Command.MAP_CREATE, 2): errno.ENOSYS}))["bpf_syscall"].reason == "no_syscall"
    )


def test_tracepoints_need_tracefs(host: Host) -> None:
    """A program that loads is of no use where no tracepoint's number can be read."""
    support = run(host, FakeKernel(tracefs=""))["tracepoint"]
    assert (support.state, support.reason) == (State.UNSUPPORTED, "no_tracefs")


def test_missing_capabilities_are_all_named(host: Host) -> None:
    """A missing optional capability is mentioned, a missing required one is no support."""
    write_capabilities(host, ALL & ~(1 << Capability.SYS_PTRACE))
    assert run(host, FakeKernel())["capabilities"] == Support.yes("missing: CAP_SYS_PTRACE")
    write_capabilities(host, 0)
    support = run(host, FakeKernel())["capabilities"]
    assert support.reason == "missing_capability"
    assert support.detail == "missing: CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_SYS_PTRACE"


def test_an_unreadable_procfs_leaves_capabilities_open(host: Host) -> None:
    """Neither a missing file nor a file without the line is an answer."""
    (host.proc / "self/status").write_text("Name:\tx\n")
    assert run(host, FakeKernel())["capabilities"].state is State.INCONCLUSIVE
    (host.proc / "self/status").unlink()
    assert run(host, FakeKernel())["capabilities"].state is State.INCONCLUSIVE


def test_lockdown_that_cannot_be_read_is_said_to_be(host: Host) -> None:
    """An empty folder means that securityfs is not mounted, another file in it that it is."""
    host.lockdown.unlink()
    assert Context(host).lockdown.endswith("lockdown ENOENT, securityfs is not mounted there")
    (host.lockdown.parent / "lsm").touch()
    assert Context(host).lockdown.endswith("lockdown ENOENT")


@given(st.integers(0, 2**41 - 1), st.lists(st.sampled_from(Capability), unique=True))
def test_missing_capabilities_are_those_that_nothing_covers(effective: int, wanted: list[Capability]) -> None:
    """CAP_SYS_ADMIN stands for CAP_BPF and CAP_PERFMON, for nothing else; order is kept."""
    missing = missing_capabilities(effective, wanted)
    admin = bool(effective & 1 << 21)
    for each in wanted:
        covered = bool(effective & 1 << each) or (admin and each in (38, 39))
        assert (each not in missing) == covered
    assert missing == [each for each in wanted if each in missing]


def test_capabilities_are_read_from_the_effective_set(host: Host) -> None:
    """The permitted set does not count."""
    write_capabilities(host, 0x1FF_FEFF_FFFF)
    assert effective_capabilities(host) == 0x1FF_FEFF_FFFF


def test_a_failing_probe_leaves_the_others_alone(host: Host) -> None:
    """An error of a probe's own makes its feature inconclusive and is logged."""

    def failing(_context: Context) -> Support:
        raise PermissionError(errno.EACCES, "Permission denied")

    table = (Feature("bad", "1.0", "something", failing), Feature("good", "", "a thing", probes.btf_vmlinux))
    with capture_logs() as logs:
        features = probe(host, table=table, calls=FakeKernel().calls())
    assert (features["bad"].state, features["bad"].reason) == (State.INCONCLUSIVE, "probe_failed")
    assert features.supported("good")
    assert [(each["event"], each["feature"]) for each in logs] == [
        ("feature_probed", "bad"),
        ("feature_probed", "good"),
    ]


def test_features_are_frozen_and_listed_in_order(host: Host) -> None:
    """A plan made from the table stays true; unknown names are a mistake of the caller."""
    features = run(host, FakeKernel())
    rows = features.as_rows()
    assert [row.name for row in rows] == list(features)
    assert features.get("no such feature") is None
    with pytest.raises(KeyError):
        features.supported("no such feature")
    change: Callable[..., None] = setattr
    with pytest.raises(FrozenInstanceError):
        change(rows[0], "state", State.SUPPORTED)
