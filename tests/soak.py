"""A service under fire for minutes, and what it costs it: `make soak`, or `python tests/soak.py --minutes 10`.

Requests of every kind in `support/abuse.py` (canaries whose answer is known, cancels, disconnects, slow readers,
malformed ones), so many at a time, on a tiny random model. Half-way the engine is killed. Prints a line every ten
seconds and a verdict; exits with 1 unless

- every request ended, and no answer was wrong or another's (those around the kill may end with an error that says so),
- the service answered again within ten seconds of the kill,
- no process grew by more than its slope in `MAX_MB_PER_MIN`, shared memory stood still in the last quarter, and every
  block was free at the end.

A full queue is an answer like any other.
"""

import argparse
import asyncio
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from charonia import LLM, SamplingParams
from support.abuse import KINDS, PATIENCE_S, Canary, Target
from support.engines import tiny_model_dir
from support.prompts import TEXTS
from support.served import TINY_FLAGS, Served, serving

THREADS = 4
SAMPLE_S = 10.0
CLEAR_MARGIN = 1e-3
MAX_MB_PER_MIN = {"stub": 3.0, "engine": 2.0, "server": 40.0}
"""The server's own code (release 24.10) grows with malformed and broken-off requests; stubs swing with huge prompts."""
BACK_WITHIN_S = 10.0
BACK_OFF_S = 1.0
"""What a client waits after an error."""
AFTERMATH_S = 5.0
"""How long after the service is back a request that began before it may still report the loss."""
_LOSS = re.compile(
    "engine|not ready|unavailable|shutting down|unloaded|Server disconnected|Stream removed|stub process",
    re.IGNORECASE,
)
"""What requests may end with when the engine has been killed."""
_FULL = "waiting queue is full"


@dataclass
class Log:
    """What has happened, from all threads."""

    ended: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    failures: list[tuple[float, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop_at: float = 0.0

    def note(self, name: str, error: Exception | None) -> None:
        """A request has come to its end."""
        with self.lock:
            self.ended[name] += 1
            if error is not None and _FULL in str(error):
                self.refused += 1
            elif error is not None:
                text = f"{name}: {type(error).__name__}: {str(error)[-300:]}"
                self.failures.append((time.monotonic(), text))


def find_canaries(model: Path, max_tokens: int) -> list[Canary]:
    """Prompts whose greedy continuation no rounding can change."""
    found = []
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=2)
    with LLM(str(model), load_format="dummy", dtype="float32", cpu_threads=1, max_num_seqs=64) as llm:
        for output in llm.generate(list(TEXTS.values()), params, use_tqdm=False):
            (sequence,) = output.outputs
            best = [sorted((e.logprob for e in p.values()), reverse=True) for p in sequence.logprobs or []]
            if min(first - second for first, second, *_ in best) > CLEAR_MARGIN:
                found.append(Canary(output.prompt or "", sequence.token_ids, sequence.text))
    return found


def bombard(served: Served, canaries: list[Canary], log: Log, concurrency: int, seed: int) -> None:
    """One thread's share of the load, until the time is over."""

    async def work(target: Target, rng: random.Random) -> None:
        names, weights = list(KINDS), [weight for weight, _ in KINDS.values()]
        while time.monotonic() < log.stop_at:
            name = rng.choices(names, weights)[0]
            error: Exception | None = None
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await KINDS[name][1](target, rng)
            except Exception as caught:
                error = caught
            log.note(name, error)
            if error is not None:
                await asyncio.sleep(BACK_OFF_S)

    async def run() -> None:
        target = Target(served.http_url, served.grpc_url, canaries)
        try:
            await asyncio.gather(*(work(target, random.Random(f"{seed}/{i}")) for i in range(concurrency)))
        finally:
            await target.close()

    asyncio.run(run())


def kill_engine(served: Served) -> tuple[float, float]:
    """When the engine was killed, and when the service answered again."""
    killed = time.monotonic()
    os.kill(served.engine_pid, signal.SIGKILL)
    while time.monotonic() - killed < 120 and not served.is_serving():
        time.sleep(0.1)
    return killed, time.monotonic()


def sample(served: Served) -> dict[str, float]:
    """Resident megabytes by process."""
    return {role: psutil.Process(pid).memory_info().rss / 1e6 for role, pid in served.pids().items()}


def slopes(samples: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Megabytes a minute of each process, over the last half of its samples."""
    found = {}
    for role in samples[-1][1]:
        points = [(at, values[role]) for at, values in samples if role in values]
        points = points[len(points) // 2 :]
        at, mb = np.array(points).T
        found[role] = float(np.polyfit(at / 60, mb, 1)[0]) if len(points) > 2 else 0.0
    return found


def shared_memory() -> int:
    """Bytes of this user's files in /dev/shm that are ours."""
    return sum(path.stat().st_size for path in Path("/dev/shm").glob("charonia_*"))


def main() -> int:
    """Fire, kill, count; 0 if all is well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--instances", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model_dir(Path(folder))
        canaries = find_canaries(model, 12)
        flags = (*TINY_FLAGS, f"--instances={options.instances}", "--max-num-seqs=64", "--gateway-port=0")
        with serving(Path(folder), str(model), *flags) as served:
            return soak(served, canaries, options)


def soak(served: Served, canaries: list[Canary], options: argparse.Namespace) -> int:
    """The run itself."""
    log = Log(stop_at=time.monotonic() + 60 * options.minutes)
    threads = [
        threading.Thread(target=bombard, args=(served, canaries, log, options.streams // THREADS, i))
        for i in range(THREADS)
    ]
    begin, half = time.monotonic(), time.monotonic() + 30 * options.minutes
    for thread in threads:
        thread.start()
    outage = (float("inf"), float("-inf"))
    samples: list[tuple[float, dict[str, float]]] = []
    shm: list[int] = []
    while time.monotonic() < log.stop_at:
        time.sleep(SAMPLE_S)
        if outage[1] < 0 and time.monotonic() > half:
            outage = kill_engine(served)
            samples.clear()
        samples.append((time.monotonic(), sample(served)))
        shm.append(shared_memory())
        memory = "  ".join(f"{role} {mb:.0f}" for role, mb in samples[-1][1].items())
        ended = sum(log.ended.values())
        print(
            f"{time.monotonic() - begin:5.0f} s  {ended:7,} ended  MB: {memory}  shm {shm[-1] >> 20}",
            flush=True,
        )
    for thread in threads:
        thread.join(PATIENCE_S + 30)
    stuck = sum(thread.is_alive() for thread in threads)
    served.wait_idle()
    return verdict(log, outage, slopes(samples), shm[-1] - shm[-1 - len(shm) // 4], stuck)


def verdict(
    log: Log, outage: tuple[float, float], growth: dict[str, float], shm_growth: int, stuck: int
) -> int:
    """Print it; 0 if all is well."""
    killed, back = outage
    told = [text for at, text in log.failures if killed <= at <= back + AFTERMATH_S and _LOSS.search(text)]
    wrong = [
        text for at, text in log.failures if not (killed <= at <= back + AFTERMATH_S and _LOSS.search(text))
    ]
    leaks = {role: mb for role, mb in growth.items() if mb > MAX_MB_PER_MIN[role.split()[0]]}
    print(f"{sum(log.ended.values()):,} requests: {dict(log.ended.most_common())}")
    print(f"{log.refused:,} were refused for a full queue")
    print(f"engine killed: answers again after {back - killed:.1f} s; {len(told)} requests were told")
    print("MB a minute: " + ", ".join(f"{role} {mb:+.2f}" for role, mb in growth.items()))
    print(f"shared memory {shm_growth:+,} bytes; {stuck} threads stuck; {len(wrong)} requests went wrong")
    for text, count in Counter(wrong).most_common(20):
        print(f"  {count} x {text}")
    well = not wrong and not leaks and not stuck and shm_growth <= 0 and back - killed <= BACK_WITHIN_S
    print("all is well" if well else f"NOT WELL (leaks: {leaks})")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
