"""What the server's own metrics say about a run."""

import re
import time

import httpx

from charonia.entrypoints.bench.serve.target import BenchError

_SAMPLE = re.compile(r"^(charonia_\w+?)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
_GAUGES = ("charonia_requests_running", "charonia_requests_waiting", "charonia_kv_cache_usage_ratio")
_INTERVAL_S = 1.0
_PUSH_PERIOD_S = 1.2
"""A model tells Triton its figures about once a second; so long after a change they are sure to be true."""
_TIMEOUT_S = 5.0


class ServerMetrics:
    """Counters as they grew between `begin` and `end`, and the highest values of gauges, read once a second."""

    def __init__(self, url: str) -> None:
        base = url if "://" in url else f"http://{url}"
        self._url = base if base.endswith("/metrics") else base.rstrip("/") + "/metrics"
        self._client = httpx.Client(timeout=_TIMEOUT_S, trust_env=False)
        self._before: dict[str, float] = {}
        self._highest: dict[str, float] = {}
        self._next = 0.0

    def begin(self) -> None:
        """Start a run, after the warm-up. Raises `BenchError` if the metrics cannot be read or are not Charonia's."""
        time.sleep(_PUSH_PERIOD_S)
        self._before, self._highest = self._read(), {}
        if not self._before:
            raise BenchError(f"{self._url} has no metrics of Charonia")

    def sample(self) -> None:
        """Look at the gauges, if it is time again; an answer that does not come is passed over."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _INTERVAL_S
        try:
            values = self._read()
        except BenchError:
            return
        for name in _GAUGES:
            if name in values:
                self._highest[name] = max(values[name], self._highest.get(name, 0.0))

    def end(self) -> dict[str, float]:
        """Growth of every counter that grew, and `max_` of the gauges."""
        time.sleep(_PUSH_PERIOD_S)
        after = self._read()
        grown = {
            name: value - self._before.get(name, 0.0)
            for name, value in after.items()
            if name.endswith("_total")
        }
        highest = {f"max_{name.removeprefix('charonia_')}": value for name, value in self._highest.items()}
        return {name.removeprefix("charonia_"): value for name, value in grown.items() if value > 0} | highest

    def _read(self) -> dict[str, float]:
        """Values by name, summed over labels."""
        values: dict[str, float] = {}
        for name, value in _SAMPLE.findall(self._fetch()):
            values[name] = values.get(name, 0.0) + float(value)
        return values

    def _fetch(self) -> str:
        try:
            answer = self._client.get(self._url)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise BenchError(f"metrics cannot be read from {self._url}: {error}") from error
        return answer.text
