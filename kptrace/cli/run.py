# SPDX-License-Identifier: Apache-2.0
"""`kptrace run`: the daemon."""

import tomllib
from pathlib import Path
from typing import Any, get_args

import click

from kptrace.cli import logs
from kptrace.daemon.settings import (
    DEFAULT_LISTEN,
    DEFAULT_SOCKET,
    BpfStatistics,
    IdentityLevel,
    LookupMechanism,
    Settings,
    parse_budget,
    parse_share,
)
from kptrace.kernel.host import Host
from kptrace.model.errors import UsageError
from kptrace.signals.sampling import Sampling

_FILE = click.Path(dir_okay=False, path_type=Path)
_DEFAULT_CACHE = "/var/cache/kptrace"


def _read_config(ctx: click.Context, _parameter: click.Parameter, path: Path | None) -> None:
    """Make the TOML file's values the defaults: flags and environment override them."""
    if path is None:
        return
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the configuration {path} is not TOML: {error}") from error
    known = {parameter.name for parameter in ctx.command.params}
    defaults = {key.replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(defaults.keys() - known)
    if unknown:
        raise UsageError(
            f"the configuration {path} has an unknown key {unknown[0]!r}",
            remedy="see 'kptrace run --help' for the names",
        )
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


@click.command(
    help="Measure this node and serve /metrics.", context_settings={"auto_envvar_prefix": "KPTRACE"}
)
@click.option(
    "--config",
    type=_FILE,
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="TOML file of options.",
)
@click.option("--config-check", is_flag=True, help="Check the options and exit.")
@click.option(
    "--netns", type=click.Path(path_type=Path), help="Network namespace to watch; default: the daemon's own."
)
@click.option("--listen", default=DEFAULT_LISTEN, show_default=True, help="Address of the metrics server.")
@click.option("--tls-certificate", type=_FILE, help="PEM certificate chain of the server.")
@click.option("--tls-key", type=_FILE, help="PEM key of the server.")
@click.option("--tls-client-ca", type=_FILE, help="PEM authority that client certificates must be signed by.")
@click.option(
    "--local-socket",
    default=DEFAULT_SOCKET,
    show_default=True,
    help="Where root on this node finds /status with all names, and records; 'none'.",
)
@click.option("--identity-file", type=_FILE, help="Manifests to take names from, instead of the API server.")
@click.option(
    "--identity",
    type=click.Choice(get_args(IdentityLevel)),
    default="services",
    show_default=True,
    help="What to watch.",
)
@click.option("--kubeconfig", type=_FILE, help="How to reach the API server; default: in-cluster.")
@click.option(
    "--start-delay",
    type=click.FloatRange(0, 600),
    default=60.0,
    show_default=True,
    help="Longest random wait before the API server is asked, seconds: a roll-out starts all nodes at once.",
)
@click.option("--node-name", default="", help="This node's name.")
@click.option(
    "--kube-proxy-metrics",
    default="",
    metavar="URL",
    help="Compare with kube-proxy's own metrics, as at http://127.0.0.1:10249.",
)
@click.option(
    "--cilium-metrics",
    default="none",
    show_default=True,
    metavar="URL|auto|none",
    help="Compare with the own metrics of Cilium's agent; auto: at http://127.0.0.1:9962/metrics, if it answers.",
)
@click.option("--sample", default="1:64", show_default=True, help="'all', REST or FIRST:REST divisors.")
@click.option("--overhead-budget", default="0.5%", show_default=True, help="Share of one core, or 'off'.")
@click.option("--brackets-with-nfqueue", is_flag=True, help="Bracket a namespace that has an NFQUEUE.")
@click.option(
    "--lookup-mechanism",
    type=click.Choice(get_args(LookupMechanism)),
    default="auto",
    show_default=True,
    help="How to time look-ups.",
)
@click.option(
    "--bpf-statistics",
    type=click.Choice(get_args(BpfStatistics)),
    default="minute",
    show_default=True,
    help="Where Cilium's programs cannot be traced: have the kernel count their runs 1 s a minute, always, or never.",
)
@click.option("--rewrites/--no-rewrites", default=True, show_default=True, help="Measure rule changes.")
@click.option(
    "--programming-nodes",
    default="5%",
    show_default=True,
    help="Share of the nodes that watch EndpointSlices and time each change until the kernel has it, or 'off'.",
)
@click.option(
    "--drift-after",
    type=click.FloatRange(1, 86_400),
    default=60.0,
    show_default=True,
    help="How long the installed endpoints of a Service must differ from the API's to be drift, seconds.",
)
@click.option("--writer", "writers", multiple=True, metavar="NAME=PATTERN", help="Another writer class.")
@click.option(
    "--max-series",
    type=click.IntRange(100, 100_000),
    default=4000,
    show_default=True,
    help="Series of one scrape.",
)
@click.option("--status-names", is_flag=True, help="Show names of services and pods in /status.")
@click.option(
    "--cache-dir", default=_DEFAULT_CACHE, show_default=True, help="Where compiled programs are kept; 'none'."
)
@click.option("--ready-file", type=_FILE, help="Write the port here once samples can come.")
@click.option(
    "--proc-root",
    default="/proc",
    show_default=True,
    type=click.Path(path_type=Path),
    help="The host's /proc.",
)
@click.option(
    "--sys-root", default="/sys", show_default=True, type=click.Path(path_type=Path), help="The host's /sys."
)
@click.option(
    "--bpffs-root",
    default="/sys/fs/bpf",
    show_default=True,
    type=click.Path(path_type=Path),
    help="The host's BPF file system.",
)
@click.option(
    "--log-format",
    type=click.Choice(get_args(logs.LogFormat)),
    default="json",
    show_default=True,
    help="Log lines.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Least level to log.",
)
def command(
    *,
    config_check: bool,
    log_format: logs.LogFormat,
    log_level: str,
    sample: str,
    overhead_budget: str,
    programming_nodes: str,
    local_socket: str,
    cache_dir: str,
    proc_root: Path,
    sys_root: Path,
    bpffs_root: Path,
    writers: tuple[str, ...],
    **options: Any,
) -> int:
    """Check the options, then run until a signal."""
    logs.configure(log_format, log_level)
    settings = Settings(
        sampling=Sampling.parse(sample),
        overhead_budget=parse_budget(overhead_budget),
        programming_nodes=parse_share(programming_nodes),
        local_socket=None if local_socket == "none" else Path(local_socket),
        cache_dir=None if cache_dir == "none" else Path(cache_dir),
        host=Host(proc=proc_root, sys=sys_root, bpffs=bpffs_root),
        writers=tuple(writers),
        **options,
    )
    settings.address()
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        raise UsageError("--tls-certificate and --tls-key go together", remedy="give both or neither")
    if config_check:
        click.echo("the configuration is good")
        return 0
    from kptrace.daemon.daemon import Daemon  # noqa: PLC0415  (a configuration check need not load the rest)

    Daemon(settings).run()
    return 0
