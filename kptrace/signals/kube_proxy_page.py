# SPDX-License-Identifier: Apache-2.0
"""What kube-proxy says of itself on its own /metrics, as far as it can be compared. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

_BUILD: Final = re.compile(r'^kubernetes_build_info\{[^}]*\bgit_version="([^"]*)"[^}]*\} ', re.MULTILINE)
_SYNC: Final = re.compile(
    r'^kubeproxy_sync_proxy_rules_duration_seconds_(count|sum)(?:\{ip_family="(\w+)"\})? (\S+)$', re.MULTILINE
)
_MODE: Final = re.compile(r"[a-z-]{1,32}")
#: The family of a kube-proxy that does not tell them apart (before 1.32 or so).
EVERY: Final = "all"


@dataclass(frozen=True, slots=True)
class Syncs:
    """How many there were, and how long all of them took, in seconds."""

    count: int = 0
    seconds: float = 0.0

    def since(self, before: "Syncs") -> "Syncs":
        """Those after `before`."""
        return Syncs(self.count - before.count, self.seconds - before.seconds)


@dataclass(frozen=True, slots=True)
class Page:
    """One look at kube-proxy.

    Attributes:
        mode: nftables, iptables or ipvs, as it calls it; empty if it does not say.
        version: `v1.36.3`; empty if it does not say.
        syncs: since its start, by family (`ipv4`, `ipv6`, or `all`). Failed ones count, and those that wrote nothing.
    """

    mode: str = ""
    version: str = ""
    syncs: Mapping[str, Syncs] = field(default_factory=dict)


def parse(metrics: str, mode: str) -> Page:
    """Read its /metrics and its /proxyMode; what is missing or no number is left out."""
    counts: dict[str, int] = {}
    sums: dict[str, float] = {}
    for what, family, text in _SYNC.findall(metrics):
        try:
            value = float(text)
            if what == "count":
                counts[family.lower() or EVERY] = int(value)
            else:
                sums[family.lower() or EVERY] = value
        except (ValueError, OverflowError):
            continue
    build = _BUILD.search(metrics)
    found = _MODE.fullmatch(mode.strip())
    syncs = {family: Syncs(count, sums[family]) for family, count in counts.items() if family in sums}
    return Page(found[0] if found else "", build[1][:64] if build else "", syncs)


class Window:
    """Our syncs against kube-proxy's, from a moment at which both were read to the next at which both count the same.

    A sync that ends between the two readings is counted by one of them only: the window then stays open until the next.
    """

    def __init__(self, longest: int = 20) -> None:
        """Give a window up after so many looks: a sync was missed for good."""
        self._longest = longest
        self._begin: tuple[Syncs, Syncs] | None = None
        self._looks = 0
        self.difference: float | None = None

    def look(self, theirs: Syncs, ours: Syncs) -> None:
        """Compare; `difference` is then the seconds by which their mean sync is longer than ours, if that is known."""
        if self._begin is None or theirs.count < self._begin[0].count:
            self._begin, self._looks = (theirs, ours), 0
            return
        since = theirs.since(self._begin[0]), ours.since(self._begin[1])
        self._looks += 1
        if since[0].count == since[1].count:
            if since[0].count:
                self.difference = (since[0].seconds - since[1].seconds) / since[0].count
        elif self._looks < self._longest:
            return
        self._begin, self._looks = (theirs, ours), 0
