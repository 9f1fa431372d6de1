# SPDX-License-Identifier: Apache-2.0
"""Writers that list what is installed, or delete connections, by netlink requests of their own: who, and from when to when.

Every process's first request is noted in the kernel, at no cost to others. Only a process that is itself of a class of
writers is followed from then on; with the first of these the receives of the node are traced, so that the end of an
answer is known too. A writer's tools (`nft`, `iptables-nft`) are processes, which the sync signal knows already.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import structlog

from kptrace.model.errors import KernelError, PrivilegeError, UnsupportedError
from kptrace.signals.processes import ProcessTable
from kptrace.signals.rewrite_requests_records import Asker, Requests, Subsystem, decode
from kptrace.signals.sync_tools import find_tool
from kptrace.signals.writers import OTHER, Writers

_NOT_ATTACHED = "not attached: no writer that asks by itself was seen"
_ATTACHED = "attached"


class RequestMaps(Protocol):
    """The kernel side (`rewrite_kernel.RewriteKernel`)."""

    def take_askers(self) -> Iterable[Requests]:
        """The first requests of processes that are not followed, each once."""
        ...

    def spans(self) -> Iterable[Requests]:
        """The last requests of those that are."""
        ...

    def follow(self, tgid: int) -> bool:
        """Keep spans of a process; whether there was room."""
        ...

    def unfollow(self, tgid: int) -> None:
        """Forget it."""
        ...

    def attach_receives(self) -> None:
        """Trace the receives of the node."""
        ...


class WritersRequests:
    """For the loop's thread; `status` and `losses` may be asked on any."""

    def __init__(
        self,
        maps: RequestMaps,
        watched: int,
        is_writer: Callable[[int], bool],
        alive: Callable[[int], bool],
        on_requests: Callable[[Requests], None],
    ) -> None:
        """Nobody is followed.

        Args:
            maps: the kernel side.
            watched: inode of the watched network namespace; requests in others are nobody's.
            is_writer: whether a process is itself of a class of writers.
            alive: whether there is a process of this id.
            on_requests: gets every span: where it goes on after it was told, the rest of it.
        """
        self._maps = maps
        self._watched = watched
        self._is_writer = is_writer
        self._alive = alive
        self._on_requests = on_requests
        self._log = structlog.get_logger(signal="rewrite")
        self._followed: frozenset[int] = frozenset()
        self._told: dict[Asker, Requests] = {}
        self._receives = _NOT_ATTACHED
        self._unfollowed = 0
        self._undecodable = 0

    def record(self, data: bytes) -> None:
        """A record of the ring: a span that another one followed."""
        requests = decode(data)
        if requests is None:
            self._undecodable += 1
        else:
            self._tell(requests)

    def consume(self, read_ring: Callable[[], None]) -> None:
        """Tell of everything up to now; `read_ring` brings what waits in the ring to `record`."""
        # Before the ring: what it has is older, or the same span at its end.
        spans = list(self._maps.spans()) if self._followed else ()
        read_ring()
        for requests in spans:
            self._tell(requests)
        self._forget_the_dead()
        before = self._followed
        for first in self._maps.take_askers():
            tgid = first.asker.tgid
            if first.asker.netns != self._watched or tgid in before:
                continue
            if tgid in self._followed or (self._is_writer(tgid) and self._follow(tgid)):
                self._tell(first)

    def _tell(self, requests: Requests) -> None:
        if requests.asker.netns != self._watched:
            return
        if requests.asker.subsystem is Subsystem.NFTABLES:
            self._see_answers()
        told = self._told.get(requests.asker)
        if told is not None and told.begin_ns == requests.begin_ns:
            if told.end_ns >= requests.end_ns:
                return
            self._on_requests(Requests(requests.asker, told.end_ns, requests.end_ns))
        else:
            self._on_requests(requests)
        self._told[requests.asker] = requests

    def _follow(self, tgid: int) -> bool:
        if not self._maps.follow(tgid):
            self._unfollowed += 1
            return False
        self._followed |= {tgid}
        self._log.info("writer_asks_itself", tgid=tgid)
        return True

    def _see_answers(self) -> None:
        """Attach to receives, which costs every one of the node: for lists of rules only.

        A clean-up of connections ends with its last deletion, near enough; and all kube-proxies do that.
        """
        if self._receives is _NOT_ATTACHED:
            try:
                self._maps.attach_receives()
                self._receives = _ATTACHED
            except (KernelError, PrivilegeError, UnsupportedError) as error:
                # Once: what this kernel refuses now, it refuses always. Requests are still seen.
                self._receives = f"refused: {error}"
                self._log.warning("receives_not_attached", detail=str(error))

    def _forget_the_dead(self) -> None:
        for tgid in [each for each in self._followed if not self._alive(each)]:
            self._maps.unfollow(tgid)
            self._followed -= {tgid}
            self._told = {asker: told for asker, told in self._told.items() if asker.tgid != tgid}

    def losses(self) -> Mapping[str, int]:
        """Requests that are in no run, by reason."""
        return {"writer_not_followed": self._unfollowed, "requests_undecodable": self._undecodable}

    def status(self) -> Mapping[str, object]:
        """What /status shows of it."""
        return {"receives": self._receives, "followed": sorted(self._followed)}


def writer_itself(
    processes: Callable[[], ProcessTable], writers: Writers, cgroup: Callable[..., str], own: int
) -> Callable[[int], bool]:
    """Whether a process, in the watched network namespace, is of a class of writers by itself, and no tool of one.

    Args:
        processes: who runs, up to now.
        writers: the classes.
        cgroup: path of a process's cgroup.
        own: the process that is never one.
    """

    def judge(tgid: int) -> bool:
        run = processes().run(tgid)
        if run is None or tgid == own or find_tool(run.executable, run.comm) is not None:
            return False
        return writers.classify([run], watched_netns=True, cgroup=cgroup) != OTHER

    return judge
