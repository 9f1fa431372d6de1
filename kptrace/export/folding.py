# SPDX-License-Identifier: Apache-2.0
"""A bound on the number of series: what is beyond it becomes one `~other` series of its metric."""

from collections.abc import Iterable, Sequence

from kptrace.model.metrics import OTHER, HistogramSample, MetricFamily, MetricSpec, Sample

AnySample = Sample | HistogramSample

#: Gauges whose sum means nothing: of times and shares, and of infos, the largest stands for all.
_LARGEST = ("_seconds", "_ratio", "_info")


class Folder:
    """Keeps scrape after scrape within a number of series, so that no counter ever falls because of it.

    Every metric may have as many series as any other; what small metrics leave is the large ones'. Who came first
    keeps its series (at first sight: in the order of the labels). A metric that was folded once takes in no new label
    set any more: if one left `~other` again, `~other` would fall, which Prometheus takes for a restart. What is
    remembered is what is shown, so it is bounded too. Not thread-safe.
    """

    def __init__(self) -> None:
        """Nothing has been folded yet."""
        self._shown: dict[str, dict[tuple[str, ...], None]] = {}
        self._closed: set[str] = set()

    def fold(self, families: Sequence[MetricFamily], limit: int) -> tuple[list[MetricFamily], dict[str, int]]:
        """Fold what does not fit into `limit` series.

        Returns:
            The families, and how many series each folded metric lost. If `limit` is less than one sample a metric,
            the result is one sample a metric.
        """
        share = fair_share([cost(family.samples) for family in families], limit)
        folded: dict[str, int] = {}
        result = []
        for family in families:
            name = family.spec.name
            if name not in self._closed:
                self._remember(family)
                if cost(family.samples) > share and len(family.samples) > 1:
                    self._closed.add(name)
            if name not in self._closed:
                result.append(family)
                continue
            kept, rest = self._split(family, share)
            if rest:
                folded[name] = cost(rest)
                kept.append(merge(family.spec, rest))
            result.append(MetricFamily(family.spec, kept))
        return result, folded

    def _remember(self, family: MetricFamily) -> None:
        present = {sample.labels for sample in family.samples}
        before = [labels for labels in self._shown.get(family.spec.name, ()) if labels in present]
        self._shown[family.spec.name] = dict.fromkeys([*before, *sorted(present.difference(before))])

    def _split(self, family: MetricFamily, share: int) -> tuple[list[AnySample], list[AnySample]]:
        each = max((cost([sample]) for sample in family.samples), default=1)
        room = max(0, share // each - 1)  # one is `~other`'s
        shown = [
            labels for labels in self._shown[family.spec.name] if any(label != OTHER for label in labels)
        ]
        keep = self._shown[family.spec.name] = dict.fromkeys(shown[:room])
        kept = [sample for sample in family.samples if sample.labels in keep]
        return kept, [sample for sample in family.samples if sample.labels not in keep]


def cost(samples: Iterable[AnySample]) -> int:
    """How many series samples are: a histogram is one for each edge, and two."""
    return sum(len(s.buckets) + 2 if isinstance(s, HistogramSample) else 1 for s in samples)


def fair_share(costs: Iterable[int], limit: int) -> int:
    """How much each may have so that the sum stays within `limit`: who needs less leaves the rest to the others."""
    ascending = sorted(costs)
    left = limit
    for index, each in enumerate(ascending):
        share = left // (len(ascending) - index)
        if each > share:
            return max(0, share)
        left -= each
    return max(0, limit)


def merge(spec: MetricSpec, samples: Sequence[AnySample]) -> AnySample:
    """One `~other` sample for all of these, of which there is at least one.

    Counters, histograms and most gauges are added; histograms of unlike ladders keep the edges that all of them have.
    """
    labels = (OTHER,) * len(spec.labels)
    histograms = [sample for sample in samples if isinstance(sample, HistogramSample)]
    if histograms:
        return _merged_histogram(labels, histograms)
    values = [sample.value for sample in samples if isinstance(sample, Sample)]
    largest = spec.kind == "info" or (spec.kind == "gauge" and spec.name.endswith(_LARGEST))
    return Sample(labels, max(values) if largest else sum(values))


def _merged_histogram(labels: tuple[str, ...], histograms: Sequence[HistogramSample]) -> HistogramSample:
    common = set.intersection(*({edge for edge, _ in each.buckets} for each in histograms))
    counts = dict.fromkeys(sorted(common), 0)
    for each in histograms:
        for edge, count in each.buckets:
            if edge in counts:
                counts[edge] += count
    return HistogramSample(labels, tuple(counts.items()), sum(each.sum for each in histograms))
