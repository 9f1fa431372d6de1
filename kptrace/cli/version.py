# SPDX-License-Identifier: Apache-2.0
"""`kptrace version`."""

import click

from kptrace import __version__


@click.command(help="Print the version.")
def command() -> None:
    """Print the version."""
    click.echo(__version__)
