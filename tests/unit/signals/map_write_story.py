# SPDX-License-Identifier: Apache-2.0
"""Calls as tests make them up: several processes with threads that call one after the other."""

from dataclasses import dataclass
from errno import E2BIG, ENOENT

from hypothesis import strategies as st

from kptrace.model.rewrite import ProcessRun
from kptrace.signals.map_write_bursts import GAP_NS, LONGEST_NS
from kptrace.signals.map_write_order import Call
from kptrace.signals.map_write_records import Command, MapWrite, Replacement, WatchedMap

MAPS = {
    1: WatchedMap(1, "lb4_services_v2", "ipv4", 1, 12, 12),
    2: WatchedMap(2, "lb6_services_v2", "ipv6", 1, 24, 12),
    3: WatchedMap(3, "lxc", "inet", 1, 20, 48),
}
PROGRAM_COMMANDS = [
    command
    for command in Command
    if command.name.startswith(("PROGRAM", "LINK")) or command is Command.UPDATE
]
MAP_COMMANDS = [command for command in Command if not command.name.startswith(("PROGRAM", "LINK"))]


def write(
    begin_ns: int,
    end_ns: int,
    *,
    tgid: int = 10,
    tid: int = 0,
    command: Command = Command.UPDATE,
    map_: int = 1,
    result: int = 0,
    asked: int = 1,
    count: int | None = None,
) -> MapWrite:
    """A call that writes to a map."""
    done = int(result >= 0) if count is None else count
    return MapWrite(
        begin_ns, end_ns, tgid, tid or tgid, command, map_, 99, result, asked, done, asked * 24, (), done > 0
    )


def who(tgid: int) -> tuple[ProcessRun, str]:
    """The process and its class."""
    return ProcessRun(tgid, executable="/usr/bin/cilium-agent"), f"w{tgid}"


@dataclass(frozen=True)
class Arrival:
    """A call, and when its record can be read; None if it was lost."""

    call: Call
    at_ns: int
    lost: bool
    twice: bool


@st.composite
def arrivals(draw: st.DrawFn, hold_ns: int) -> list[Arrival]:
    """Calls of some threads, with records that arrive in the order of nobody, some twice, and some never."""
    found = []
    gaps = st.sampled_from([0, 1, 1000, GAP_NS - 1, GAP_NS, GAP_NS + 1, 3 * GAP_NS, LONGEST_NS // 2])
    takes = st.sampled_from([1, 500, 20_000, GAP_NS, 5 * GAP_NS])
    for tid in range(100, 100 + draw(st.integers(1, 5))):
        at = draw(st.integers(0, 2 * GAP_NS))
        for _ in range(draw(st.integers(1, 12))):
            begin = at + draw(gaps)
            at = begin + draw(takes)
            call: Call
            if draw(st.integers(0, 3)):
                command = draw(st.sampled_from(MAP_COMMANDS))
                result = draw(st.sampled_from([0, 0, 0, -ENOENT, -E2BIG]))
                call = write(
                    begin,
                    at,
                    tgid=tid // 2,
                    tid=tid,
                    command=command,
                    map_=draw(st.sampled_from(sorted(MAPS))),
                    result=result,
                )
            else:
                command = draw(st.sampled_from(PROGRAM_COMMANDS))
                call = Replacement(
                    begin, at, tid // 2, tid, command, draw(st.sampled_from([0, -1])), "cil", 5
                )
            delay = draw(st.integers(0, hold_ns - 1))
            found.append(Arrival(call, at + delay, draw(st.integers(0, 9)) == 0, draw(st.booleans())))
    return found
