# SPDX-License-Identifier: Apache-2.0
"""One thing that a writer does in a run: a process that it starts, or what it does itself. No I/O."""

from collections.abc import Iterator
from typing import Final

from kptrace.model.rewrite import Outcome, Rewrite
from kptrace.signals.sync_events import Phase, Span
from kptrace.signals.sync_phases import Interval
from kptrace.signals.sync_tools import Role, Tool

#: Transactions and spans that are remembered of one step.
MAX_PARTS: Final = 256


class Step:
    """A process of a run, from its exec to its exit; or, without a process of its own, something between two moments.

    Attributes:
        tgid, owner, writer, tool: as the events told.
        begin_ns: exec.
        end_ns: exit, None while it lives.
        status: as `Ended` has it.
        commits: its transactions.
        spans: its waits.
        own: whether it is the writer itself.
        seen: whether its beginning and its end are those of the process.
        last_ns: the last that was seen of it.
        overflow: transactions and waits beyond the bound, which are forgotten.
    """

    def __init__(
        self, tgid: int, owner: int, writer: str, tool: Tool, begin_ns: int, *, own: bool = False
    ) -> None:
        """It just began."""
        self.tgid = tgid
        self.owner = owner
        self.writer = writer
        self.tool = tool
        self.begin_ns = begin_ns
        self.end_ns: int | None = None
        self.last_ns = begin_ns
        self.status: int | None = None
        self.commits: list[Rewrite] = []
        self.spans: list[Span] = []
        self.own = own
        self.seen = True
        self.overflow = 0

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.end_ns is None

    @property
    def failed(self) -> bool:
        """Whether it ended by a signal, or with an exit code that is not 0."""
        return bool(self.status)

    @property
    def writes(self) -> bool:
        """Whether it hands over changes, as far as known."""
        return bool(self.commits) or self.tool.role in (Role.WRITE, Role.TABLE)

    @property
    def outcome(self) -> Outcome:
        """How a writing step ended: by its exit, else by its transactions."""
        found = {each.outcome for each in self.commits}
        if self.failed or Outcome.FAILED in found:
            return Outcome.FAILED
        for each in (Outcome.COMMITTED, Outcome.UNKNOWN, Outcome.EMPTY):
            if each in found:
                return each
        return Outcome.UNKNOWN if self.status is None else Outcome.EMPTY

    def wrote(self, rewrite: Rewrite) -> None:
        """A transaction of it returned."""
        if self._room():
            self.last_ns = max(self.last_ns, rewrite.end_ns)
            self.commits.append(rewrite)

    def waited(self, span: Span) -> None:
        """It waited."""
        if self._room():
            self.last_ns = max(self.last_ns, span.end_ns)
            self.spans.append(span)

    def _room(self) -> bool:
        if len(self.commits) + len(self.spans) < MAX_PARTS:
            return True
        self.overflow += 1
        self.seen = False
        return False

    def end(self, at_ns: int | None, status: int | None = None) -> None:
        """It is over; `at_ns` None: since when is unknown."""
        if at_ns is None:
            self.seen = False
        self.end_ns = self.last_ns = max(self.last_ns, at_ns or 0)
        self.status = status

    def intervals(self) -> Iterator[Interval]:
        """What it spent its time on."""
        end = self.last_ns
        for span in self.spans:
            yield Interval(span.begin_ns, span.end_ns, span.phase)
        if self.tool.role is Role.CONNTRACK:
            yield Interval(self.begin_ns, end, Phase.CONNTRACK)
        elif self.commits or self.tool.role in (Role.WRITE, Role.CHANGE, Role.REMOVE, Role.TABLE):
            yield from self._writing(end)
        else:
            yield Interval(self.begin_ns, end, Phase.LIST)

    def _writing(self, end: int) -> Iterator[Interval]:
        at = self.begin_ns
        for commit in sorted(self.commits, key=lambda each: each.begin_ns):
            yield Interval(commit.begin_ns, commit.end_ns, Phase.COMMIT)
            if not self.own:
                yield Interval(at, commit.begin_ns, Phase.WRITE)
            at = max(at, commit.end_ns)
        if not self.own:
            yield Interval(at, end, Phase.TEARDOWN if self.commits else Phase.WRITE)
