# SPDX-License-Identifier: Apache-2.0
"""`kptrace check`: what can be measured on this node, and why not the rest."""

import json
import platform
from dataclasses import asdict
from pathlib import Path

import click

from kptrace.cli import logs
from kptrace.dataplanes.installed import InstalledChains
from kptrace.kernel.features import Features, probe
from kptrace.kernel.host import Host
from kptrace.kernel.memlock import raise_memlock
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.errors import KptraceError
from kptrace.model.netfilter import BaseChain
from kptrace.model.signal import MechanismState, State
from kptrace.signals.mechanisms import judge_all

#: What `--strict` wants: at least one mechanism of each of these signals.
_WANTED = ("lookup", "rewrite")
_UNSUPPORTED = 4


@click.command(help="Say what can be measured on this node, and why not the rest.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--strict", is_flag=True, help="Exit with code 4 unless look-ups and rewrites can be measured.")
@click.option("--netns", type=click.Path(path_type=Path), help="Network namespace to look at.")
@click.option(
    "--proc-root", default="/proc", show_default=True, type=click.Path(path_type=Path), help="The host's."
)
@click.option(
    "--sys-root", default="/sys", show_default=True, type=click.Path(path_type=Path), help="The host's."
)
def command(*, as_json: bool, strict: bool, netns: Path | None, proc_root: Path, sys_root: Path) -> int:
    """Probe, print, judge."""
    logs.configure("console", "warning")
    raise_memlock()
    features = probe(Host(proc=proc_root, sys=sys_root))
    states = judge_all(features)
    chains, trouble = _chains(netns)
    if as_json:
        click.echo(json.dumps(_document(features, states, chains, trouble), indent=2))
    else:
        click.echo(_table(features, states, chains, trouble))
    measurable = {state.signal for state in states if state.state is State.ACTIVE}
    return _UNSUPPORTED if strict and not measurable.issuperset(_WANTED) else 0


def _chains(path: Path | None) -> tuple[tuple[BaseChain, ...], str]:
    """The base chains of the namespace, or what kept them from being read."""
    try:
        with InstalledChains(NetworkNamespace(path)) as installed:
            return installed.read(), ""
    except (KptraceError, OSError) as error:
        return (), str(error)


def _document(
    features: Features, states: list[MechanismState], chains: tuple[BaseChain, ...], trouble: str
) -> dict[str, object]:
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "lockdown": features.lockdown,
        "signals": [asdict(state) for state in states],
        "features": [asdict(row) for row in features.as_rows()],
        "base_chains": [
            {
                "dataplane": chain.dataplane,
                "family": chain.family,
                "hook": chain.hook.label,
                "priority": chain.effective_priority,
                "table": chain.table,
                "chain": chain.chain,
                "type": chain.type,
            }
            for chain in chains
        ],
        "base_chains_error": trouble,
    }


def _table(
    features: Features, states: list[MechanismState], chains: tuple[BaseChain, ...], trouble: str
) -> str:
    lines = [f"Linux {platform.release()} on {platform.machine()}; lockdown: {features.lockdown}", ""]
    for state in states:
        lines.append(
            f"{state.signal:<14}{state.mechanism:<12}{state.state:<13}{state.reason:<20}{state.detail}".rstrip()
        )
    lines.append("")
    for row in features.as_rows():
        since = f"since {row.since}" if row.since else ""
        lines.append(f"{row.name:<24}{row.state:<14}{since:<13}{row.reason:<20}{row.detail}".rstrip())
    lines.append("")
    lines.append(f"base chains: {trouble or len(chains)}")
    for chain in chains:
        place = f"{chain.family} {chain.hook.label} {chain.effective_priority}"
        lines.append(f"  {chain.dataplane:<16}{place:<24}{chain.table} {chain.chain}")
    return "\n".join(lines)
