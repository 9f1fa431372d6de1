# SPDX-License-Identifier: Apache-2.0
"""`kptrace demo`: the main job, on an embedded node, with one table at the end."""

import json
import signal

import click

from kptrace.cli import logs
from kptrace.experiments.demo import DemoOptions, Kept, run_demo
from kptrace.experiments.demo_result import DemoResult
from kptrace.experiments.netns import sweep


def _stay(kept: Kept) -> None:
    """Stay up until Ctrl-C."""
    click.echo(
        f"\nStill running: {kept.url}/metrics (the node: nsenter --net={kept.netns} nft list ruleset). Ctrl-C ends it.",
        err=True,
    )
    try:
        signal.pause()
    except KeyboardInterrupt:
        click.echo("ending", err=True)


@click.command(help="Run the whole path on an embedded node and print what it measured.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--keep", is_flag=True, help="Leave the last node and its daemon up until Ctrl-C.")
@click.option(
    "--services",
    "sizes",
    multiple=True,
    type=click.IntRange(1, 10_000),
    help="Numbers of services; default 100 and 2000.",
)
def command(*, as_json: bool, keep: bool, sizes: tuple[int, ...]) -> int:
    """Run every data plane at every size."""
    logs.configure("console", "warning")
    for name in sweep():
        click.echo(f"removed {name}, left behind by a killed run", err=True)

    def show(result: DemoResult) -> None:
        if as_json:
            click.echo(json.dumps(result.as_json(), indent=2))
        else:
            click.echo(result.as_table())
            click.echo("From /metrics:\n  " + "\n  ".join(result.metrics))

    def stay(kept: Kept) -> None:
        show(kept.result)
        _stay(kept)

    options = DemoOptions(sizes=sizes or (100, 2000), keep=stay if keep else None)
    result = run_demo(options, lambda line: click.echo(line, err=True))
    if not keep:
        show(result)
    return 0
