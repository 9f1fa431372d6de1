# SPDX-License-Identifier: Apache-2.0
"""docs/metrics.md, from the specifications in the code. Pure."""

from collections.abc import Iterable

from kptrace.model.metrics import MetricSpec

_HEAD = """\
# Metrics

Made by the code from the code: not to be edited (`make golden` writes it).

An info is a gauge of value 1. A label set appears with its first sample. Beyond `--max-series` what is too much is
folded into one series of its metric whose labels are all `~other`: counts are added, of times and shares the largest
is shown.

| name | type | labels | meaning |
| --- | --- | --- | --- |
"""


def catalogue(specs: Iterable[MetricSpec]) -> str:
    """The page: one row a metric, by name.

    Raises:
        ValueError: two specifications of one name differ.
    """
    known: dict[str, MetricSpec] = {}
    for spec in specs:
        if known.setdefault(spec.name, spec) != spec:
            raise ValueError(f"{spec.name} is specified twice, and differently")
    return _HEAD + "".join(_row(known[name]) for name in sorted(known))


def _row(spec: MetricSpec) -> str:
    labels = ", ".join(f"`{label}`" for label in spec.labels)
    meaning = " ".join(spec.help.split()).replace("\\", "\\\\").replace("|", "\\|")
    return f"| `{spec.name}` | {spec.kind} | {labels} | {meaning} |\n"
