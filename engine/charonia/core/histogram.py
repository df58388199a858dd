"""Observations counted by bucket: what a Prometheus histogram needs, at the price of a bisection each."""

from bisect import bisect_left

import msgspec


class Histogram(msgspec.Struct):
    """Bucket `i` holds what is at most `bounds[i]` and more than the bound before; the last one holds the rest.

    Invariant: `counts` and `sums` have one entry more than `bounds`, which ascend.
    """

    bounds: tuple[float, ...]
    counts: list[int]
    sums: list[float]

    @classmethod
    def empty(cls, bounds: tuple[float, ...]) -> "Histogram":
        """A histogram of nothing."""
        size = len(bounds) + 1
        return cls(bounds, [0] * size, [0.0] * size)

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, once or several times."""
        i = bisect_left(self.bounds, value)
        self.counts[i] += times
        self.sums[i] += value * times

    def copy(self) -> "Histogram":
        """One that stays as it is now."""
        return Histogram(self.bounds, self.counts.copy(), self.sums.copy())

    def since(self, before: "Histogram | None") -> "Histogram":
        """What has been added since a copy was taken; all of it where it was begun anew since."""
        if before is None or before.bounds != self.bounds or before.count > self.count:
            return self
        return Histogram(
            self.bounds,
            [now - then for now, then in zip(self.counts, before.counts, strict=True)],
            [now - then for now, then in zip(self.sums, before.sums, strict=True)],
        )

    @property
    def count(self) -> int:
        """Number of observations."""
        return sum(self.counts)

    @property
    def sum(self) -> float:
        """Sum of the observations."""
        return sum(self.sums)

    def sample(self, most: int) -> list[float]:
        """At most about `most` values that stand for the observations: each bucket's mean, as often as its share.

        Up to `most` observations there is one value each: counts by bucket and the sum are exact.
        """
        count = self.count
        share = min(1.0, max(most, 0) / count) if count else 0.0
        values: list[float] = []
        for number, total in zip(self.counts, self.sums, strict=True):
            if number:
                values += [total / number] * max(1, round(number * share))
        return values
