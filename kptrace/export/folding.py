# SPDX-License-Identifier: Apache-2.0
"""A bound on the number of series: what is beyond it becomes one `~other` series of its metric. Pure."""

from collections.abc import Sequence

from kptrace.model.metrics import OTHER, HistogramSample, MetricFamily, Sample


def cost(family: MetricFamily) -> int:
    """How many series a family is: a histogram is one for each edge, and two."""
    return sum(len(s.buckets) + 2 if isinstance(s, HistogramSample) else 1 for s in family.samples)


def fold(families: Sequence[MetricFamily], limit: int) -> tuple[list[MetricFamily], dict[str, int]]:
    """Fold the largest families until all fit.

    Returns:
        The families, and how many samples were folded, by metric. Sums and counts are kept; gauges that describe things
        (infos) lose their excess, since adding them means nothing.
    """
    shown = list(families)
    folded: dict[str, int] = {}
    while (excess := sum(map(cost, shown)) - limit) > 0:
        index = max(range(len(shown)), key=lambda i: (cost(shown[i]), shown[i].spec.name))
        family = shown[index]
        if len(family.samples) < 2:  # nothing is left that could be folded
            return shown, folded
        each = cost(family) // len(family.samples)
        keep = max(0, len(family.samples) - 2 - excess // max(1, each))
        kept, rest = list(family.samples[:keep]), family.samples[keep:]
        merged = _merge(
            [s for s in rest if isinstance(s, Sample)], [s for s in rest if isinstance(s, HistogramSample)]
        )
        if family.spec.kind == "info" or merged is None:
            shown[index] = MetricFamily(family.spec, kept)
        else:
            shown[index] = MetricFamily(family.spec, [*kept, merged])
        folded[family.spec.name] = folded.get(family.spec.name, 0) + len(rest)
    return shown, folded


def _merge(plain: Sequence[Sample], histograms: Sequence[HistogramSample]) -> Sample | HistogramSample | None:
    if histograms:
        width = len(histograms[0].labels)
        counts = [0] * len(histograms[0].buckets)
        for histogram in histograms:
            counts = [a + b for a, (_, b) in zip(counts, histogram.buckets, strict=True)]
        edges = tuple((edge, count) for (edge, _), count in zip(histograms[0].buckets, counts, strict=True))
        return HistogramSample((OTHER,) * width, edges, sum(h.sum for h in histograms))
    if plain:
        return Sample((OTHER,) * len(plain[0].labels), sum(sample.value for sample in plain))
    return None
