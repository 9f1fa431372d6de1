# SPDX-License-Identifier: Apache-2.0
"""What Cilium's agent says of itself on its own /metrics, as far as it can be compared. Pure.

Which metrics it has depends on its version and settings: what is missing is left out.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from kptrace.dataplanes.cilium.layout_table import LAYOUTS
from kptrace.dataplanes.cilium.layouts import PREFIX, Role, unversioned

_SAMPLE: Final = re.compile(
    r"^cilium_(version|feature_datapath_network|bpf_map_ops_total)\{([^}\n]*)\} (\S+)$", re.MULTILINE
)
_LABEL: Final = re.compile(r'(\w+)="([^"]*)"')
_OPERATIONS: Final = frozenset({"update", "delete"})
_LONGEST: Final = 64


def _short(name: str) -> str:
    """How the agent calls a map in its metrics, without the version that some agents leave out."""
    return unversioned(name).removeprefix(PREFIX).rstrip("_")


_ROLES: Final = {
    _short(layout.name): layout.role
    for layout in LAYOUTS
    if layout.role not in (Role.CALLS, Role.CALL_POLICY)
}

#: Map and operation, as labels have them.
Operation = tuple[str, str]


@dataclass(frozen=True, slots=True)
class AgentPage:
    """One look at the agent.

    Attributes:
        version: `1.18.2`; empty if it does not say.
        mode: how packets reach other nodes, as it calls it (`overlay-vxlan`); empty if it does not say (before 1.17 or so).
        operations: its successful updates and deletions of map entries since its start, of the maps that kptrace knows.
    """

    version: str = ""
    mode: str = ""
    operations: Mapping[Operation, int] = field(default_factory=dict)


def parse(metrics: str) -> AgentPage:
    """Read its /metrics; what is missing or no number is left out."""
    version = mode = ""
    operations: dict[Operation, int] = {}
    for name, labels, value in _samples(metrics):
        if name == "version":
            version = labels.get("version", "")[:_LONGEST]
        elif name == "feature_datapath_network":
            mode = labels.get("mode", "")[:_LONGEST] if value else mode
        else:
            # Before 1.10 the label was called mapName.
            role = _ROLES.get(_short(labels.get("map_name", labels.get("mapName", ""))))
            operation = labels.get("operation", "")
            if role is not None and operation in _OPERATIONS and labels.get("outcome") == "success":
                key = role.value, operation
                operations[key] = operations.get(key, 0) + value
    return AgentPage(version, mode, operations)


def _samples(metrics: str) -> Iterator[tuple[str, Mapping[str, str], int]]:
    for name, labels, text in _SAMPLE.findall(metrics):
        try:
            value = int(float(text))
        except (ValueError, OverflowError):
            continue
        yield name, dict(_LABEL.findall(labels)), value


@dataclass(frozen=True, slots=True)
class Look:
    """Both sides at one moment.

    Attributes:
        theirs: the agent's counts.
        least, most: ours before it was asked and after it had answered: between them is what corresponds.
    """

    theirs: Mapping[Operation, int]
    least: Mapping[Operation, int]
    most: Mapping[Operation, int]


class Comparison:
    """By how much the agent counted more than we did, from the first look at both on."""

    def __init__(self) -> None:
        """Nothing was looked at."""
        self._begin: Look | None = None
        self.differences: Mapping[Operation, int] = {}

    def reset(self) -> None:
        """Begin anew with the next look: it is another agent."""
        self._begin = None
        self.differences = {}

    def look(self, now: Look) -> None:
        """Compare; 0 is whatever may be due to operations while the agent was asked."""
        begin = self._begin
        if begin is None or any(now.theirs.get(key, 0) < count for key, count in begin.theirs.items()):
            self._begin, self.differences = now, dict.fromkeys(now.theirs, 0)
            return
        found = {}
        for key, count in now.theirs.items():
            gained = count - begin.theirs.get(key, 0)
            least = now.least.get(key, 0) - begin.most.get(key, 0)
            most = now.most.get(key, 0) - begin.least.get(key, 0)
            found[key] = gained - min(max(gained, least), most)
        self.differences = found
