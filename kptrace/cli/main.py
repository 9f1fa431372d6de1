# SPDX-License-Identifier: Apache-2.0
"""The command line: `kptrace COMMAND`, its errors as one line, its exit codes from `kptrace.model.errors`."""

import sys
from importlib import import_module

import click

from kptrace import __version__
from kptrace.model.errors import KptraceError

#: Command name to module; loaded when asked for, so that `kptrace version` does not pay for the rest.
COMMANDS = {
    "run": "Measure this node and serve /metrics.",
    "check": "Say what can be measured on this node, and why not the rest.",
    "demo": "Run the whole path on an embedded node and print what it measured.",
    "explain": "Say what a first packet to a Service walks and costs, and what changed.",
    "version": "Print the version.",
}
_INTERRUPTED = 130


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"kptrace.cli.{cmd_name}").command
        assert isinstance(command, click.Command)  # noqa: S101  (a wrong module is a bug, not bad input)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_LazyGroup, context_settings={"auto_envvar_prefix": "KPTRACE", "help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="kptrace")
def cli() -> None:
    """How long the kernel takes to look a packet up, and how long a rule change takes to reach it.

    Exit codes: 0 success, 1 a bug, 2 wrong usage, 3 a missing privilege, 4 this kernel cannot, 5 a bad manifest, 6 the
    address cannot be bound, 7 the compiler failed, 8 the kernel refused, 130 interrupted.
    """


def main() -> None:
    """Run the command line and exit."""
    try:
        code = cli.main(standalone_mode=False)
    except KptraceError as error:
        click.echo(f"kptrace: {error.one_line()}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("kptrace: interrupted", err=True)
        sys.exit(_INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)
