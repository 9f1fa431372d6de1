# SPDX-License-Identifier: Apache-2.0
"""Runs inside a test machine whose clock counts instructions: what each mechanism adds to a packet. JSON lines on stdout.

Usage: guest.py LOOPS, the compiled tools/bench/loops.c. Needs the installed kptrace, nft, iptables-legacy, bpftrace.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

from kptrace.experiments.daemon_process import DaemonProcess, DaemonRequest, default_command
from kptrace.experiments.netns import Namespace, stop
from kptrace.model.errors import KptraceError

RULES = 1000
PACKETS = 4000
ROUNDS = 5
SETTLE_SECONDS, QUIET_SECONDS = 120.0, 2.0
ADDRESSES = [f"192.0.{n >> 8}.{n & 255}" for n in range(RULES)]
NFT = "".join(f"ip daddr {address} drop\n" for address in ADDRESSES)
LEGACY = "".join(f"-A OUTPUT -d {address} -j DROP\n" for address in ADDRESSES)
RULE_SETS = {
    "nftables": (
        ["nft", "-f", "-"],
        f"table ip t {{ chain c {{ type filter hook output priority 0;\n{NFT}}}; }}\n",
        {"table": "t"},
    ),
    "iptables-legacy": (
        ["iptables-legacy-restore"],
        f"*filter\n{LEGACY}COMMIT\n",
        # Two walks a packet: through OUTPUT, and through INPUT, which has no rules.
        {"table": "filter"},
    ),
}
FUNCTIONS = {"nftables": "nft_do_chain", "iptables-legacy": "ipt_do_table"}
EVERY, THIN = ("--sample", "all"), ()
#: By name: a mechanism of the daemon and its sampling.
WAYS = {
    f"{mechanism}, {sampling}": ("--lookup-mechanism", mechanism, *options)
    for mechanism in ("bracket", "fentry", "kprobe")
    for sampling, options in (("every packet", EVERY), ("1/64", THIN))
}
BPFTRACE = (
    "kprobe:{function} {{ @start[tid] = nsecs; }} "
    "kretprobe:{function} /@start[tid]/ {{ @ns = hist(nsecs - @start[tid]); delete(@start[tid]); }} "
    'BEGIN {{ printf("ready\\n"); }}'
)
LOOKUPS, UNPAIRED = "kptrace_lookup_duration_seconds", "kptrace_lookup_unpaired_total"

#: Samples, their sum in ns, and packets that were lost, up to now; None where the way does not tell.
Counts = Callable[[], tuple[int, float, int] | None]


class Spinner:
    """A process that runs while nothing else does, but for `paused`.

    Where the machine's clock counts instructions it jumps to the next timer while the machine idles: to wait for a file of
    the host would take minutes by that clock, and every time limit would be over.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(["chrt", "--idle", "0", "sh", "-c", "while :; do :; done"])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the machine to whoever measures."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def settle(pid: int) -> None:
    """Wait until a process has used hardly any CPU for a while: it shares the one CPU, and probes on after it is ready."""
    ends = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < ends:
        before = _ticks(pid)
        time.sleep(QUIET_SECONDS)
        if _ticks(pid) - before <= QUIET_SECONDS:  # one of the hundred ticks of each second
            return
    raise KptraceError("the daemon does not come to rest")


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@contextmanager
def daemon(
    namespace: Namespace, folder: Path, labels: dict[str, str], options: tuple[str, ...]
) -> Iterator[Counts]:
    """The daemon with these options, and nothing but look-ups; gives what it timed and lost up to now."""
    (folder / "none.json").write_text('{"apiVersion": "v1", "kind": "List", "items": []}')
    ready = folder / f"ready-{len(list(folder.iterdir()))}"
    request = DaemonRequest(namespace.path, folder / "none.json", ready)
    argv = [*default_command(request), "--cache-dir", str(folder / "cache"), "--no-rewrites"]
    argv += ["--overhead-budget", "off", *options]
    with DaemonProcess(argv, request.ready_file, folder / "log", ready_seconds=600) as process:
        settle(process.pid)

        def counts() -> tuple[int, float, int]:
            scrape = process.scrape()
            spent = scrape.total(f"{LOOKUPS}_sum", **labels) * 1e9
            return scrape.distribution(LOOKUPS, **labels).count, spent, int(scrape.total(UNPAIRED))

        yield counts


@contextmanager
def bpftrace(function: str) -> Iterator[Counts]:
    """A script as a user would write it: a kprobe pair and a map of start times by thread."""
    process = subprocess.Popen(
        ["bpftrace", "-B", "none", "-e", BPFTRACE.format(function=function)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        if not any("ready" in line for line in process.stdout or ()):
            raise KptraceError(f"bpftrace cannot trace {function}")
        yield lambda: None
    finally:
        stop(process)


def measure(plane: str, loops: str, folder: Path, spinner: Spinner) -> None:
    """Print instructions per send, one line a way; an error's text where a way does not work."""
    with Namespace("bench") as namespace:
        argv, text, labels = RULE_SETS[plane]
        namespace.run(argv, stdin=text)
        ways: dict[str, Callable[[], AbstractContextManager[Counts]]] = {
            "nothing": lambda: nullcontext(lambda: None),
            **{name: partial(daemon, namespace, folder, labels, options) for name, options in WAYS.items()},
            "bpftrace, kprobe pair and start map": partial(bpftrace, FUNCTIONS[plane]),
        }
        for name, way in ways.items():
            row: dict[str, object] = {"plane": plane, "way": name, "sent": PACKETS * ROUNDS}
            try:
                with way() as counts:
                    row["instructions"] = min(flood(namespace, loops, spinner) for _ in range(ROUNDS))
                    if (counted := counts()) is not None:
                        row["timed"], spent, row["lost"] = counted
                        row["mean"] = spent / counted[0] if counted[0] else None
            except KptraceError as error:
                row["error"] = str(error)
            print(f"instructions: {json.dumps(row)}", flush=True)


def flood(namespace: Namespace, loops: str, spinner: Spinner) -> float:
    """Instructions per send of one round, none of which failed."""
    with spinner.paused():
        each, failed = namespace.run([loops, "sendto", str(PACKETS)]).split()
    if int(failed):
        raise KptraceError(f"{failed} of {PACKETS} sends failed")
    return float(each)


def main() -> int:
    """Measure both data planes."""
    spinner = Spinner()
    try:
        subprocess.run(["modprobe", "-a", "nf_tables", "ip_tables", "iptable_filter"], check=True)
        with tempfile.TemporaryDirectory(dir="/run") as name:
            # Not from the host's folder while the clock jumps.
            loops = shutil.copy(sys.argv[1], name)
            for plane in RULE_SETS:
                measure(plane, loops, Path(name), spinner)
    finally:
        spinner.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
