# SPDX-License-Identifier: Apache-2.0
"""What is in Cilium's maps, and its agent's own metrics, as parts of the daemon. Where Cilium is not, they do nothing."""

from collections.abc import Mapping
from typing import Final

from kptrace.daemon.fetcher import Fetcher
from kptrace.daemon.part import Node, Part, Running
from kptrace.daemon.settings import Settings
from kptrace.kernel.bytecode import Bytecode
from kptrace.model.errors import UnsupportedError
from kptrace.signals.cilium_agent import CiliumAgentSignal
from kptrace.signals.datapath import DatapathSignal
from kptrace.signals.datapath_inventory import DatapathInventory

#: Where the agent has them if it is told to have them, and nothing else.
AGENT_URL: Final = "http://127.0.0.1:9962/metrics"
_PATH: Final = "/metrics"


def _datapath(node: Node) -> DatapathSignal:
    if node.shared.datapath is None:
        raise UnsupportedError("the datapath signal does not run: nothing tells which maps are Cilium's")
    return node.shared.datapath


def _start_inventory(node: Node, _code: Bytecode) -> Running:
    datapath = _datapath(node)
    signal = DatapathInventory(node.settings.host)
    node.stack.callback(signal.close)
    node.loop.call_soon_threadsafe(lambda: datapath.subscribe(signal.seen))
    return signal


def start_agent(node: Node, roles: Mapping[int, str]) -> Running:
    """Compare with the agent's own metrics.

    Args:
        node: with the datapath signal; the map write signal may come later.
        roles: what maps are for, by the number that map writes have.

    Raises:
        UsageError: the setting is no URL.
    """
    datapath, shared = _datapath(node), node.shared
    auto = node.settings.cilium_metrics == "auto"
    url = AGENT_URL if auto else node.settings.cilium_metrics
    fetcher = Fetcher(node.netns, url, "--cilium-metrics", f"{AGENT_URL}, auto or none")
    signal = CiliumAgentSignal(
        lambda: fetcher(fetcher.path or _PATH),
        node.loop,
        lambda: {} if shared.map_losses is None else roles,
        optional=auto,
    )
    node.stack.callback(signal.close)

    def follow() -> None:
        shared.map_written.append(signal.written)
        shared.map_settled.append(signal.settled)
        datapath.subscribe(signal.seen)

    node.loop.call_soon_threadsafe(follow)
    return signal


def agent_off(settings: Settings) -> str:
    """What switches the comparison off; empty if it is on."""
    return "--cilium-metrics=none" if settings.cilium_metrics == "none" else ""


INVENTORY: Final = Part("datapath_inventory", "map_read", None, _start_inventory)
