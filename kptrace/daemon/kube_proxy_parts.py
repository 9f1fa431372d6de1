# SPDX-License-Identifier: Apache-2.0
"""kube-proxy's own metrics as a part of the daemon."""

from kptrace.daemon.fetcher import Fetcher
from kptrace.daemon.part import Node, Part, Running
from kptrace.daemon.settings import Settings
from kptrace.kernel.bytecode import Bytecode
from kptrace.signals.kube_proxy import KubeProxySignal


def _start(node: Node, _code: Bytecode) -> Running:
    url = node.settings.kube_proxy_metrics
    fetcher = Fetcher(node.netns, url, "--kube-proxy-metrics", "http://127.0.0.1:10249")
    signal = KubeProxySignal(fetcher, node.loop)
    node.stack.callback(signal.close)
    node.shared.synced.append(signal.synced)
    node.shared.proxy = signal.proxy
    signal.start()
    return signal


def _disabled(settings: Settings) -> str:
    return "" if settings.kube_proxy_metrics else "no --kube-proxy-metrics"


#: After the sync signal, whose runs it compares.
PARTS = (Part("kube_proxy", "scrape", None, _start, _disabled),)
