"""When requests are sent."""

import math
from dataclasses import dataclass

import numpy as np

from charonia.entrypoints.bench.serve.records import Floats


@dataclass(frozen=True, slots=True)
class Load:
    """How hard the server is pressed.

    concurrency: requests in flight at most; None: no limit. rate: requests a second that arrive, whatever the server
    does; inf: all at once, so that the concurrency alone decides (a closed loop of as many users).
    """

    concurrency: int | None
    rate: float

    @property
    def is_closed_loop(self) -> bool:
        """Whether each answer is what lets the next request go."""
        return math.isinf(self.rate)

    @property
    def label(self) -> str:
        """As a table shows it."""
        users = "" if self.concurrency is None else f"{self.concurrency} user{'s' * (self.concurrency > 1)}"
        rate = "" if self.is_closed_loop and users else f"{self.rate:g} req/s"
        return ", ".join(part for part in (users, rate) if part)


def arrival_times(rng: np.random.Generator, count: int, rate: float, burstiness: float) -> Floats:
    """Seconds after the start at which requests arrive [count], at least one; zeros for an infinite rate.

    The gaps are gamma-distributed with shape `burstiness`: 1 is a Poisson process, less comes in bursts, more is
    steadier. They are scaled so that the last request arrives at `count / rate`: short runs offer the load that they
    are named after.
    """
    if math.isinf(rate):
        return np.zeros(count)
    times: Floats = np.cumsum(rng.gamma(burstiness, 1.0, count))
    times *= count / rate / times[-1]
    return times
