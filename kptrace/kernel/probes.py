# SPDX-License-Identifier: Apache-2.0
"""One probe per kernel feature. A probe tries the thing itself in its smallest form and leaves nothing behind."""

import errno
import struct
from typing import Final

from kptrace.kernel.btf import Btf, BtfMissing
from kptrace.kernel.capabilities import Capability, missing_capabilities
from kptrace.kernel.load import AttachType, ProgramType
from kptrace.kernel.maps import BPF_F_MMAPABLE, MapType
from kptrace.kernel.run_statistics import RUN_TIME
from kptrace.kernel.support import Context, Support
from kptrace.kernel.syscall import Command
from kptrace.model.errors import KernelError, UnsupportedError

# r0 = N; exit
_RETURN_0: Final = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)
_RETURN_1: Final = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 1, 0x95, 0, 0, 0)
# r1 = r10 - 8; r2 = 8; r3 = 0; call bpf_probe_read_kernel; r0 = 0; exit
_READ_KERNEL: Final = (
    struct.pack("<BBhiBBhi", 0xBF, 0xA1, 0, 0, 0x07, 1, 0, -8)
    + struct.pack("<BBhiBBhi", 0xB7, 2, 0, 8, 0xB7, 3, 0, 0)
    + struct.pack("<BBhi", 0x85, 0, 0, 113)
    + _RETURN_0
)
_NFPROTO_IPV4: Final = 2
_INT_MIN: Final = -(1 << 31)
# Functions to try a tracing program on: the first exists for this purpose and nothing calls it.
_TARGETS: Final = ("bpf_fentry_test1", "nft_do_chain", "ip_rcv")
_MAP_NEEDS: Final = (Capability.BPF,)
_NETFILTER_NEEDS: Final = (Capability.BPF, Capability.NET_ADMIN)
_TRACING_NEEDS: Final = (Capability.BPF, Capability.PERFMON)
_STATISTICS_NEED: Final = (Capability.SYS_ADMIN,)
#: What every mechanism needs, and what some do.
REQUIRED: Final = (Capability.BPF, Capability.PERFMON, Capability.NET_ADMIN)
OPTIONAL: Final = (Capability.SYS_ADMIN, Capability.SYS_PTRACE)


def capabilities(context: Context) -> Support:
    """What the process may do: CAP_SYS_ADMIN for other namespaces, CAP_SYS_PTRACE for other processes' files."""
    if isinstance(context.effective, KernelError):
        return Support.unknown("probe_failed", str(context.effective))
    missing = missing_capabilities(context.effective, (*REQUIRED, *OPTIONAL))
    detail = f"missing: {', '.join(map(str, missing))}" if missing else ""
    if set(missing) & set(REQUIRED):
        return Support.no("missing_capability", detail)
    return Support.yes(detail)


def bpf_syscall(context: Context) -> Support:
    """bpf(2): Linux kernel commit 99c55f7d47c0 ("bpf: introduce BPF syscall and maps") (in v3.18)."""
    return _make_map(context, MapType.ARRAY, 4, 8, 1, 0)


def btf_vmlinux(context: Context) -> Support:
    """The kernel's BTF: Linux kernel commit 341dfcf8d78e ("btf: expose BTF info through sysfs") (in v5.4)."""
    if isinstance(context.btf, Btf):
        return Support.yes(f"{context.btf.end_id - 1} types in {context.host.vmlinux_btf}")
    return Support.no("no_btf", str(context.btf))


def btf_modules(context: Context) -> Support:
    """BTF of modules: Linux kernel commit 36e68442d1af ("bpf: Load and verify kernel module BTFs") (in v5.11).

    Where no module is loaded there is nothing that could lack it.
    """
    loaded = sorted(path.parent.name for path in (context.host.sys / "module").glob("*/initstate"))
    described = [name for name in loaded if context.host.module_btf(name).exists()]
    if loaded and not described:
        folder = context.host.vmlinux_btf.parent
        return Support.no("no_module_btf", f"{len(loaded)} modules are loaded, none is in {folder}")
    return Support.yes(f"{len(described)} of {len(loaded)} loaded modules have it")


def follow_pointers(context: Context) -> Support:
    """Reading what the verifier knows nothing of: by `bpf_rdonly_cast`, or by a helper that a lockdown may refuse.

    Linux kernel commit 6ae08ae3dea2 ("bpf: Add probe_read_{user, kernel} and probe_read_{user, kernel}_str helpers") (in
    v5.5).
    """
    try:
        context.calls.close(context.calls.load(_READ_KERNEL, ProgramType.RAW_TRACEPOINT))
    except KernelError as error:
        if kfunc_rdonly_cast(context).supported:
            return Support.yes("by bpf_rdonly_cast only")
        refusal = context.refusal("load", error, _TRACING_NEEDS)
        return Support(
            refusal.state, refusal.reason, f"bpf_probe_read_kernel: {refusal.detail}; {context.lockdown}"
        )
    return Support.yes("a program with bpf_probe_read_kernel loads")


def kfunc_dynptr_from_skb(context: Context) -> Support:
    """Reading packets: Linux kernel commit b5964b968ac6 ("bpf: Add skb dynptrs") (in v6.4)."""
    return _in_btf(context, "bpf_dynptr_from_skb")


def kfunc_rdonly_cast(context: Context) -> Support:
    """Following pointers: Linux kernel commit a35b9af4ec2c ("bpf: Add a kfunc for generic type cast") (in v6.2)."""
    return _in_btf(context, "bpf_rdonly_cast")


def netfilter_link(context: Context) -> Support:
    """Programs on netfilter hooks.

    Linux kernel commit 84601d6ee68a ("bpf: add bpf_link support for BPF_NETFILTER programs") (in v6.4). The link is
    asked for at a priority that the kernel refuses by ERANGE once all else is in order, so nothing is ever attached.
    """
    try:
        program = context.calls.load(_RETURN_1, ProgramType.NETFILTER, AttachType.NETFILTER)
    except KernelError as error:
        return context.refusal("load", error, _NETFILTER_NEEDS)
    attr = struct.pack(
        "<IIIIIIiI", program, 0, AttachType.NETFILTER, 0, _NFPROTO_IPV4, 0, _INT_MIN, 0
    ) + bytes(32)
    try:
        context.calls.close(context.calls.bpf(Command.LINK_CREATE, attr))
    except KernelError as error:
        if error.errno == errno.ERANGE:
            return Support.yes(
                "a program loads, and a link at an impossible priority gets ERANGE as it should"
            )
        return context.refusal("link", error, _NETFILTER_NEEDS)
    finally:
        context.calls.close(program)
    return Support.yes("a program loads and links")


def ring_buffer(context: Context) -> Support:
    """Linux kernel commit 457f44363a88 ("bpf: Implement BPF ring buffer and verifier support for it") (in v5.8)."""
    # 64 KiB is a multiple of every page size.
    return _make_map(context, MapType.RINGBUF, 0, 0, 1 << 16, 0)


def mmapable_array(context: Context) -> Support:
    """Linux kernel commit fc9702273e2e ("bpf: Add mmap() support for BPF_MAP_TYPE_ARRAY") (in v5.5)."""
    return _make_map(context, MapType.ARRAY, 4, 8, 1, BPF_F_MMAPABLE)


def tracepoint(context: Context) -> Support:
    """Linux kernel commit 98b5c2c65c29 ("perf, bpf: allow bpf programs attach to tracepoints") (in v4.7)."""
    loaded = _load(context, ProgramType.TRACEPOINT)
    if loaded is not None:
        return loaded
    try:
        return Support.yes(f"tracefs: {context.calls.find_tracefs(context.host)}")
    except UnsupportedError as error:
        return Support.no("no_tracefs", f"{error}; {context.lockdown}")


def raw_tracepoint(context: Context) -> Support:
    """Linux kernel commit c4f6699dfcb8 ("bpf: introduce BPF_RAW_TRACEPOINT") (in v4.17)."""
    return _load(context, ProgramType.RAW_TRACEPOINT) or Support.yes("a program loads")


def fentry(context: Context) -> Support:
    """Linux kernel commit fec56f5890d9 ("bpf: Introduce BPF trampoline") (in v5.5)."""
    if not isinstance(context.btf, Btf):
        return Support.no("no_btf", str(context.btf))
    target = _first_function(context.btf)
    if target is None:
        return Support.unknown("no_symbol", f"the kernel's BTF has none of {', '.join(_TARGETS)}")
    name, type_id = target
    step = "load"
    try:
        program = context.calls.load(_RETURN_0, ProgramType.TRACING, AttachType.TRACE_FENTRY, type_id)
        try:
            # A loaded program proves nothing yet: some kernels refuse only the trampoline.
            step = "attach"
            attached = context.calls.bpf(Command.RAW_TRACEPOINT_OPEN, struct.pack("<QIIQ", 0, program, 0, 0))
            context.calls.close(attached)
        finally:
            context.calls.close(program)
    except KernelError as error:
        refusal = context.refusal(step, error, _TRACING_NEEDS)
        return Support(
            refusal.state, refusal.reason, f"{step} on {name}: {refusal.detail}; {context.lockdown}"
        )
    return Support.yes(f"attached to {name}")


def kprobe(context: Context) -> Support:
    """Linux kernel commit e12f03d7031a ("perf/core: Implement the 'perf_kprobe' PMU") (in v4.17)."""
    path = context.host.sys / "bus/event_source/devices/kprobe/type"
    config = context.kconfig("CONFIG_KPROBES")
    try:
        pmu = int(path.read_text())
    except (OSError, ValueError) as error:
        seen = errno.errorcode.get(error.errno or 0, "?") if isinstance(error, OSError) else "is no number"
        return Support.no("no_kprobe_pmu", f"{path}: {seen}; {config}")
    tried = []
    for name in _TARGETS:
        try:
            context.calls.close(context.calls.open_kprobe(pmu, name))
        except KernelError as error:
            if error.errno == errno.ENOENT:
                tried.append(name)
                continue
            refusal = context.refusal("attach", error, (Capability.PERFMON,))
            detail = f"kprobe on {name}: {refusal.detail}; {context.lockdown}; {config}"
            return Support(refusal.state, refusal.reason, detail)
        return Support.yes(f"attached to {name}")
    return Support.unknown("no_symbol", f"perf_event_open: ENOENT for {', '.join(tried)}")


def run_statistics(context: Context) -> Support:
    """Linux kernel commit d46edd671a14 ("bpf: Sharing bpf runtime stats with BPF_ENABLE_STATS") (in v5.8)."""
    try:
        fd = context.calls.bpf(Command.ENABLE_STATS, struct.pack("=I", RUN_TIME))
    except KernelError as error:
        return context.refusal("enable_stats", error, _STATISTICS_NEED)
    context.calls.close(fd)
    return Support.yes()


def _make_map(context: Context, kind: MapType, key: int, value: int, entries: int, flags: int) -> Support:
    try:
        fd = context.calls.bpf(Command.MAP_CREATE, struct.pack("<IIIII", kind, key, value, entries, flags))
    except KernelError as error:
        return context.refusal("map", error, _MAP_NEEDS)
    context.calls.close(fd)
    return Support.yes()


def _load(context: Context, kind: ProgramType) -> Support | None:
    """None if a program of this type loads, else why not."""
    try:
        context.calls.close(context.calls.load(_RETURN_0, kind))
    except KernelError as error:
        return context.refusal("load", error, _TRACING_NEEDS)
    return None


def _in_btf(context: Context, name: str) -> Support:
    if not isinstance(context.btf, Btf):
        return Support.no("no_btf", str(context.btf))
    try:
        return Support.yes(f"BTF id {context.btf.func_id(name)}")
    except BtfMissing as error:
        return Support.no("no_symbol", str(error))


def _first_function(btf: Btf) -> tuple[str, int] | None:
    for name in _TARGETS:
        try:
            return name, btf.func_id(name)
        except BtfMissing:
            continue
    return None
