# SPDX-License-Identifier: Apache-2.0
"""A reader of kptrace's own /metrics: sums of samples and of histograms by label, and quantiles. Pure but `fetch`.

It shares no code with the exporter, so a mistake there is not made twice.
"""

import http.client
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kptrace.model.errors import KptraceError

_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+.*)?")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"\s*,?\s*')
_ESCAPED = re.compile(r"\\(.)")


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of an exposition."""

    name: str
    labels: Mapping[str, str]
    value: float

    def matches(self, name: str, labels: Mapping[str, str]) -> bool:
        """Whether it has this name and at least these labels."""
        return self.name == name and all(self.labels.get(key) == value for key, value in labels.items())


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram: cumulative counts at ascending edges, the last of which is infinity; empty where nothing is."""

    buckets: tuple[tuple[float, float], ...] = ()

    @property
    def count(self) -> int:
        """The number of observations."""
        return int(self.buckets[-1][1]) if self.buckets else 0

    def since(self, before: "Distribution") -> "Distribution":
        """What was observed after `before`."""
        earlier = dict(before.buckets)
        return Distribution(tuple((edge, count - earlier.get(edge, 0.0)) for edge, count in self.buckets))

    def quantile(self, q: float) -> float:
        """The q-quantile, interpolated within its bucket; the last finite edge where it lies above; NaN if empty."""
        rank = q * self.count
        low, below = 0.0, 0.0
        if self.count == 0:
            return math.nan
        for edge, count in self.buckets:
            if count >= rank and count > below:
                return low if math.isinf(edge) else low + (edge - low) * (rank - below) / (count - below)
            low, below = (low if math.isinf(edge) else edge), count
        return low


def _labels(text: str) -> dict[str, str]:
    def unescape(match: re.Match[str]) -> str:
        return "\n" if match[1] == "n" else match[1]

    return {found[1]: _ESCAPED.sub(unescape, found[2]) for found in _LABEL.finditer(text)}


def parse(text: str) -> Iterator[Sample]:
    """Every sample of an exposition in the text or OpenMetrics format.

    Raises:
        KptraceError: a line is neither a sample nor a comment.
    """
    # Not splitlines: it also splits at characters that a label value may hold.
    for line in text.split("\n"):
        if not line or line.startswith("#"):
            continue
        match = _SAMPLE.fullmatch(line)
        if match is None:
            raise KptraceError(
                f"not a sample: {line[:100]!r}", remedy="see what answers at the metrics address"
            )
        yield Sample(match[1], _labels(match[2] or ""), float(match[3]))


class Scrape:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._samples: Sequence[Sample] = tuple(parse(text))

    def total(self, name: str, **labels: str) -> float:
        """The sum of all samples of this name with at least these labels; 0 if there are none."""
        return math.fsum(sample.value for sample in self._samples if sample.matches(name, labels))

    def distribution(self, name: str, **labels: str) -> Distribution:
        """All histograms of this name with at least these labels, as one."""
        sums: dict[float, float] = {}
        for sample in self._samples:
            if sample.matches(f"{name}_bucket", labels):
                edge = float(sample.labels["le"])
                sums[edge] = sums.get(edge, 0.0) + sample.value
        return Distribution(tuple(sorted(sums.items())))

    def lines(self, name: str, **labels: str) -> list[str]:
        """The lines, as they stand, of this metric's samples with at least these labels (`_bucket` and such too)."""
        shown = []
        for line in self.text.split("\n"):
            if line.startswith(name):
                (sample,) = parse(line)
                if sample.matches(sample.name, labels):
                    shown.append(line)
        return shown


def fetch(port: int, path: str = "/metrics", *, timeout: float = 10.0) -> tuple[int, str]:
    """GET a path from the loopback address; returns the status and the body.

    Raises:
        OSError: nothing answers there, or it stopped in the middle.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    except http.client.HTTPException as error:
        raise ConnectionError(f"a broken answer: {error!r}") from error
    finally:
        connection.close()
