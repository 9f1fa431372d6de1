# SPDX-License-Identifier: Apache-2.0
"""Feature probes on the running kernel, against what other tools see of it."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kptrace.kernel.features import State, probe
from kptrace.kernel.host import Host
from kptrace.kernel.memlock import raise_memlock

_PMU = Path("/sys/bus/event_source/devices/kprobe/type")


def test_probing_leaves_nothing_behind() -> None:
    """No descriptor, program, map or link outlives the probes."""
    descriptors = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    probe(Host())
    assert set(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208
    if shutil.which("bpftool"):
        listing = subprocess.run(
            ["bpftool", "prog", "list"], capture_output=True, text=True, check=True
        ).stdout
        assert "kptrace_probe" not in listing


def test_brackets_have_all_they_need() -> None:
    """Netfilter links and both kfuncs are there wherever this suite runs natively."""
    features = probe(Host())
    needed = ("capabilities", "btf_vmlinux", "netfilter_link", "kfunc_dynptr_from_skb", "kfunc_rdonly_cast")
    assert {name: features[name].state for name in needed} == dict.fromkeys(needed, State.SUPPORTED)
    assert features.supported("ring_buffer", "mmapable_array", "tracepoint", "raw_tracepoint")


def test_kprobes_are_supported_only_with_their_device() -> None:
    """Without the kprobe PMU they are unsupported, and the reason is that file."""
    support = probe(Host())["kprobe"]
    if _PMU.exists():
        assert support.reason != "no_kprobe_pmu"
    else:
        assert (support.state, support.reason) == (State.UNSUPPORTED, "no_kprobe_pmu")
        assert f"{_PMU}: ENOENT" in support.detail


def test_tracing_programs_show_the_errno_that_strace_sees() -> None:
    """Where fentry is refused, the errno in the detail is that of the bpf call as strace records it."""
    support = probe(Host())["fentry"]
    if support.supported:
        assert support.detail.startswith("attached to ")
        return
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    code = "from kptrace.kernel import features, host; print(features.probe(host.Host())['fentry'].reason)"
    command = ["strace", "-f", "-e", "trace=bpf", sys.executable, "-c", code]
    seen = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    refused = [line for line in seen.splitlines() if "BPF_PROG_TYPE_TRACING" in line and "= -1 " in line]
    assert refused
    errno_name = refused[0].rsplit("= -1 ", 1)[1].split()[0]
    assert errno_name in support.detail
    assert "lockdown: " in support.detail


def test_the_limit_of_locked_memory_is_lifted_or_said() -> None:
    """The limit is infinite afterwards, or the answer says why not."""
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    try:
        trouble = raise_memlock()
        assert bool(trouble) != (resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)
