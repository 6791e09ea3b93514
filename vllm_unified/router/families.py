"""Metric families of Prometheus, made of plain mappings: label values → value."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

PREFIX = "vllm_unified_"
Labels = tuple[str, ...]


class Histogram:
    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def buckets(self) -> Iterator[tuple[str, float]]:
        """Upper bound, and how many were not above it."""
        below = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            below += count
            yield bound, below


def counter(name: str, text: str, labels: Sequence[str], series: Mapping[Labels, float]) -> Metric:
    family = CounterMetricFamily(f"{PREFIX}{name}", text, labels=labels)
    for values, value in series.items():
        family.add_metric(values, value)
    return family


def gauge(name: str, text: str, labels: Sequence[str], series: Mapping[Labels, float]) -> Metric:
    family = GaugeMetricFamily(f"{PREFIX}{name}", text, labels=labels)
    for values, value in series.items():
        family.add_metric(values, value)
    return family


def histogram(name: str, text: str, labels: Sequence[str], series: Mapping[Labels, Histogram]) -> Metric:
    family = HistogramMetricFamily(f"{PREFIX}{name}_seconds", text, labels=labels)
    for values, each in series.items():
        family.add_metric(values, list(each.buckets()), each.total)
    return family
