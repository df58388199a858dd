"""Metric families and series in the server: created once, then pushed to."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from charonia.core.histogram import Histogram
from charonia.triton.metric_families import Family
from charonia.triton.pb import PbMetric, TritonUtils, keep_forever


class MetricRegistry:
    """The series of one model instance. Every call that pushes a value is a round trip to the server.

    labels: of every series. Instances of a model that declare the same series share it: counters and histograms add
    up, and of gauges the latest value counts.
    """

    def __init__(self, utils: TritonUtils, labels: Mapping[str, str]) -> None:
        self._utils = utils
        self._labels = dict(labels)
        self._families: dict[str, Family] = {}
        self._makers: dict[str, Callable[..., PbMetric]] = {}
        self._series: dict[tuple[str, str], PbMetric] = {}

    def declare(self, families: Iterable[Family]) -> None:
        """Make families, and the series whose labels are known. Raises when the server has metrics turned off."""
        for family in families:
            self._families[family.name] = family
            if family.kind == "buckets":
                self._declare_buckets(family)
                continue
            self._make_family(family.kind, family.name, family.help)
            if not family.label:
                self._get(family.name)
            for value in family.values:
                self._get(family.name, family.label, value)

    def add(self, name: str, value: float, label: str = "") -> None:
        """Add to a counter; label: the value of the family's own label."""
        if value:
            self._get(name, self._families[name].label, label).increment(value)

    def set(self, name: str, value: float, label: str = "") -> None:
        """Set a gauge."""
        self._get(name, self._families[name].label, label).set(value)

    def observe(self, name: str, values: Iterable[float]) -> None:
        """Add observations to a histogram, each of which is a round trip."""
        series = self._get(name)
        for value in values:
            series.observe(value)

    def add_buckets(self, name: str, added: Histogram) -> None:
        """Add observations to a family of kind "buckets"."""
        count = 0
        for le, number in zip(_le_values(added.bounds), added.counts, strict=True):
            count += number
            if count:
                self._get(name + "_bucket", "le", le).increment(count)
        if count:
            self._get(name + "_count").increment(count)
            self._get(name + "_sum").increment(added.sum)

    def _declare_buckets(self, family: Family) -> None:
        for name in family.exported_names:
            self._make_family("counter", name, family.help)
        for le in _le_values(family.bounds):
            self._get(family.name + "_bucket", "le", le)
        for suffix in ("_sum", "_count"):
            self._get(family.name + suffix)

    def _make_family(self, kind: str, name: str, text: str) -> None:
        self._makers[name] = keep_forever(self._utils.metric_family(kind, name, text)).Metric

    def _get(self, name: str, label: str = "", value: str = "") -> PbMetric:
        """A series, made when it is first asked for."""
        series = self._series.get((name, value))
        if series is None:
            labels = self._labels | ({label: value} if label else {})
            family = self._families.get(name)
            extra = {"buckets": list(family.bounds)} if family is not None and family.bounds else {}
            series = self._series[name, value] = keep_forever(self._makers[name](labels=labels, **extra))
        return series


def _le_values(bounds: Sequence[float]) -> list[str]:
    """Values of the label `le`, by bucket."""
    return [f"{bound:g}" for bound in bounds] + ["+Inf"]
