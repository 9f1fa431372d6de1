# SPDX-License-Identifier: Apache-2.0
"""Runs inside a test machine whose clock counts instructions: what each mechanism adds to a packet. JSON on stdout.

Usage: guest.py LOOPS, the compiled tools/bench/loops.c. Needs the installed kptrace, nft, iptables-legacy, bpftrace.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kptrace.experiments.daemon_process import DaemonProcess, DaemonRequest, default_command
from kptrace.experiments.netns import Namespace, stop
from kptrace.model.errors import KptraceError

RULES = 1000
PACKETS = 4000
ROUNDS = 5
ADDRESSES = [f"192.0.{n >> 8}.{n & 255}" for n in range(RULES)]
NFT = "".join(f"ip daddr {address} drop\n" for address in ADDRESSES)
LEGACY = "".join(f"-A OUTPUT -d {address} -j DROP\n" for address in ADDRESSES)
RULE_SETS = {
    "nftables": (
        ["nft", "-f", "-"],
        f"table ip t {{ chain c {{ type filter hook output priority 0;\n{NFT}}}; }}\n",
    ),
    "iptables-legacy": (["iptables-legacy-restore"], f"*filter\n{LEGACY}COMMIT\n"),
}
FUNCTIONS = {"nftables": "nft_do_chain", "iptables-legacy": "ipt_do_table"}
WAYS = {
    "nothing": None,
    "bracket, every packet": ["--lookup-mechanism", "bracket", "--sample", "all"],
    "bracket, 1/64": ["--lookup-mechanism", "bracket"],
    "fentry, every packet": ["--lookup-mechanism", "fentry", "--sample", "all"],
    "fentry, 1/64": ["--lookup-mechanism", "fentry"],
    "kprobe, every packet": ["--lookup-mechanism", "kprobe", "--sample", "all"],
    "kprobe, 1/64": ["--lookup-mechanism", "kprobe"],
}
BPFTRACE = (
    "kprobe:{function} {{ @start[tid] = nsecs; }} "
    "kretprobe:{function} /@start[tid]/ {{ @ns = hist(nsecs - @start[tid]); delete(@start[tid]); }} "
    'BEGIN {{ printf("ready\\n"); }}'
)


@contextmanager
def daemon(namespace: Namespace, folder: Path, options: list[str]) -> Iterator[None]:
    """The daemon with these options, and nothing but look-ups."""
    (folder / "none.json").write_text('{"apiVersion": "v1", "kind": "List", "items": []}')
    request = DaemonRequest(
        namespace.path, folder / "none.json", folder / f"ready-{len(list(folder.iterdir()))}"
    )
    argv = [*default_command(request), "--cache-dir", str(folder / "cache"), "--no-rewrites"]
    argv += ["--overhead-budget", "off", *options]
    with DaemonProcess(argv, request.ready_file, folder / "log", ready_seconds=300):
        yield


@contextmanager
def bpftrace(function: str) -> Iterator[None]:
    """A script as a user would write it: a kprobe pair and a map of start times by thread."""
    process = subprocess.Popen(
        ["bpftrace", "-B", "none", "-e", BPFTRACE.format(function=function)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        if not any("ready" in line for line in process.stdout or ()):
            raise KptraceError(f"bpftrace cannot trace {function}")
        yield
    finally:
        stop(process)


def measure(plane: str, loops: str, folder: Path) -> dict[str, float | str]:
    """Instructions per send, by way; an error's text where a way does not work."""
    with Namespace("bench") as namespace:
        argv, text = RULE_SETS[plane]
        namespace.run(argv, stdin=text)

        def flood() -> float:
            return min(
                float(namespace.run([loops, "sendto", str(PACKETS)]).split()[0]) for _ in range(ROUNDS)
            )

        def inside(way: Callable[[], object]) -> float | str:
            try:
                with way():  # type: ignore[attr-defined]  # a context manager
                    return flood()
            except KptraceError as error:
                return str(error)

        found: dict[str, float | str] = {}
        for name, options in WAYS.items():
            if options is None:
                found[name] = flood()
            else:
                found[name] = inside(lambda chosen=options: daemon(namespace, folder, chosen))
        found["bpftrace, kprobe pair"] = inside(lambda: bpftrace(FUNCTIONS[plane]))
        return found


def main() -> int:
    """Measure both data planes."""
    subprocess.run(["modprobe", "-a", "nf_tables", "ip_tables", "iptable_filter"], check=True)
    with tempfile.TemporaryDirectory() as name:
        result = {plane: measure(plane, sys.argv[1], Path(name)) for plane in RULE_SETS}
    print(f"instructions: {json.dumps(result)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
