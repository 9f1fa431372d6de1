# SPDX-License-Identifier: Apache-2.0
"""Modules that come and go, on a fake kernel."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kptrace.kernel.btf import BtfMissing
from kptrace.kernel.host import Host
from kptrace.model.errors import KernelError, KptraceError, UnsupportedError
from kptrace.model.signal import State
from kptrace.signals import lookup_function_follow
from kptrace.signals.lookup_function_follow import FunctionFollower
from kptrace.signals.lookup_function_kernel import Target
from kptrace.signals.lookup_function_layout import FUNCTIONS, Function

NFT, IPT, IP6T = FUNCTIONS


class FakeKernel:
    """Attaches to everything but what is refused."""

    def __init__(self, mechanism: str) -> None:
        self.mechanism = mechanism
        self.attached: dict[str, int] = {}
        self.refuse: dict[str, KptraceError] = {}
        self.attempts: list[str] = []

    def attach(self, target: Target) -> None:
        """See `FunctionKernel`."""
        self.attempts.append(target.function.name)
        if error := self.refuse.get(target.function.name):
            raise error
        self.attached[target.function.name] = target.module

    def detach(self, function: Function) -> None:
        """See `FunctionKernel`."""
        del self.attached[function.name]


class Bench:
    """A follower, its host's modules, and which functions are built in or lack BTF."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, mechanism: str = "kprobe") -> None:
        self.host = Host(sys=root)
        self.kernel = FakeKernel(mechanism)
        self.built_in: set[Function] = set()
        self.lacking: dict[Function, KptraceError] = {}
        self.reads = 0
        monkeypatch.setattr(lookup_function_follow, "find_targets", self._find)
        self.asked = threading.Event()
        self.follower = FunctionFollower(self.kernel, self.host, self.asked.set)  # type: ignore[arg-type]

    def _find(self, _host: Host, _mechanism: str, modules: dict[Function, int]) -> dict[Function, object]:
        self.reads += 1
        return {
            function: self.lacking.get(function) or Target(function, {}, 1, module)
            for function, module in modules.items()
            if module or function in self.built_in
        }

    def load(self, function: Function, state: str = "live") -> None:
        """Load the function's module."""
        folder = self.host.sys / "module" / function.module
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "initstate").write_text(f"{state}\n")

    def unload(self, function: Function) -> None:
        """Unload it, and keep its folder's number from being given again at once."""
        folder = self.host.sys / "module" / function.module
        folder.rename(folder.with_name(f"gone{time.monotonic_ns()}"))

    def settle(self) -> None:
        """Tick until what is being read was read."""
        self.follower.tick(attached=True)
        if self.follower._reading is not None:
            self.follower._reading.result()
        self.follower.tick(attached=True)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A bench with kprobes."""
    made = Bench(tmp_path, monkeypatch)
    yield made
    made.follower.close()
    assert not made.kernel.attached


def test_without_modules_it_waits_for_them(bench: Bench) -> None:
    """Nothing is there, and that is no failure."""
    bench.follower.start()
    assert (bench.follower.state.state, bench.follower.state.reason) == (State.ACTIVE, "waiting_for_module")
    assert "ipt_do_table: waits for the module ip_tables" in bench.follower.state.detail


def test_built_in_functions_are_attached_to_at_once(bench: Bench) -> None:
    """They have no module to wait for."""
    bench.built_in = {NFT}
    bench.follower.start()
    assert bench.kernel.attached == {"nft_do_chain": 0}
    assert bench.follower.state.reason == "ok"


def test_what_was_read_is_attached_to_by_the_tick_that_it_asks_for(bench: Bench) -> None:
    """A module's BTF once read, it does not wait for the next tick that would come anyway."""
    bench.follower.start()
    bench.load(IPT)
    assert not bench.asked.is_set()
    bench.follower.tick(attached=True)
    assert bench.asked.wait(10)
    assert not bench.kernel.attached
    bench.follower.tick(attached=True)
    assert list(bench.kernel.attached) == ["ipt_do_table"]


def test_a_module_that_comes_is_attached_to_when_it_is_live(bench: Bench) -> None:
    """Not while it is coming; its BTF is read once, in another thread."""
    bench.follower.start()
    bench.load(IPT, "coming")
    bench.settle()
    assert not bench.kernel.attached
    bench.load(IPT)
    bench.settle()
    assert list(bench.kernel.attached) == ["ipt_do_table"]
    for _ in range(3):
        bench.settle()
    assert bench.reads == 2
    assert bench.kernel.attempts == ["ipt_do_table"]


def test_a_module_that_goes_is_let_go_and_followed_again(bench: Bench) -> None:
    """Also if it is back before anybody looked: it is another one."""
    bench.load(IP6T)
    bench.follower.start()
    first = dict(bench.kernel.attached)
    bench.unload(IP6T)
    bench.follower.tick(attached=True)
    assert not bench.kernel.attached
    assert bench.follower.state.reason == "waiting_for_module"
    bench.load(IP6T)
    bench.settle()
    second = dict(bench.kernel.attached)
    assert first.keys() == second.keys() == {"ip6t_do_table"}
    bench.unload(IP6T)
    bench.load(IP6T)
    bench.settle()
    assert bench.kernel.attached["ip6t_do_table"] not in (first["ip6t_do_table"], second["ip6t_do_table"])


def test_a_refusal_is_not_tried_again_before_the_module_is_another(bench: Bench) -> None:
    """One warning, the reason in the state, the others measured."""
    bench.load(NFT)
    bench.load(IPT)
    bench.kernel.refuse["nft_do_chain"] = KernelError("bpf: EINVAL", errno=22)
    bench.follower.start()
    for _ in range(3):
        bench.settle()
    assert bench.kernel.attempts.count("nft_do_chain") == 1
    assert (bench.follower.state.state, bench.follower.state.reason) == (State.DEGRADED, "attach_refused")
    assert "nft_do_chain: bpf: EINVAL" in bench.follower.state.detail
    bench.kernel.refuse.clear()
    bench.unload(NFT)
    bench.load(NFT)
    bench.settle()
    assert bench.follower.state.reason == "ok"


def test_a_module_without_btf_is_told_apart(bench: Bench) -> None:
    """It is the BTF that is missing, not a permission."""
    bench.load(NFT)
    bench.load(IPT)
    bench.lacking[NFT] = BtfMissing("nft_pktinfo", "struct")
    bench.follower.start()
    assert (bench.follower.state.state, bench.follower.state.reason) == (State.DEGRADED, "no_module_btf")
    assert "nft_pktinfo" in bench.follower.state.detail


def test_a_function_that_cannot_be_told_does_not_end_the_waiting_for_others(bench: Bench) -> None:
    """As on kernels before v5.11 with nf_tables loaded, where kube-proxy brings ip_tables after the daemon."""
    bench.load(NFT)
    bench.lacking[NFT] = BtfMissing("nft_pktinfo", "struct")
    bench.follower.start()
    assert (bench.follower.state.state, bench.follower.state.reason) == (State.DEGRADED, "no_module_btf")
    bench.load(IPT)
    bench.settle()
    assert list(bench.kernel.attached) == ["ipt_do_table"]


def test_fentry_leaves_what_it_cannot_find_to_kprobes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function that only the BTF lacks is no reason to wait: there is another mechanism."""
    bench = Bench(tmp_path, monkeypatch, "fentry")
    bench.load(NFT)
    bench.lacking[NFT] = BtfMissing("nft_do_chain", "function")
    with pytest.raises(UnsupportedError, match="nft_do_chain"):
        bench.follower.start()
    bench.follower.close()


def test_nothing_but_refusals_is_unsupported(bench: Bench) -> None:
    """The message has what was seen, the lockdown file too."""
    bench.load(NFT)
    bench.kernel.refuse["nft_do_chain"] = KernelError("bpf: EPERM", errno=1)
    with pytest.raises(UnsupportedError, match=r"nft_do_chain: bpf: EPERM.*lockdown: "):
        bench.follower.start()


def test_detached_for_its_cost_and_back(bench: Bench) -> None:
    """Nothing is read again for that."""
    bench.load(NFT)
    bench.follower.start()
    bench.follower.tick(attached=False)
    assert not bench.kernel.attached
    assert bench.follower.state.reason == "over_budget"
    bench.follower.tick(attached=True)
    assert bench.kernel.attached
    assert bench.reads == 1


def test_fentry_says_that_it_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a module can be pinned."""
    bench = Bench(tmp_path, monkeypatch, "fentry")
    bench.built_in = {IPT}
    bench.load(NFT)
    bench.follower.start()
    detail = bench.follower.state.detail
    assert "nft_do_chain: attached, pins the module nf_tables; ipt_do_table: attached; " in detail
    bench.follower.close()


def test_the_end_of_the_namespace_is_the_last_word(bench: Bench) -> None:
    """Detached for good."""
    bench.load(NFT)
    bench.follower.start()
    bench.follower.end("namespace_ended", "gone")
    bench.follower.tick(attached=True)
    assert not bench.kernel.attached
    assert (bench.follower.state.state, bench.follower.state.reason) == (State.OFF, "namespace_ended")
