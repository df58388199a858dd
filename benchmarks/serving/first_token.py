"""What the way through Triton adds to the first token of a request that is alone, beside the least that can answer.

    python benchmarks/serving/first_token.py --requests 300 --instances 1

Two servers run side by side: ours, with an engine without a model (`paced_engine.py`), and `bare_model.py`. One client
asks them by turns, in blocks. Milliseconds to the first response; of the processes, context switches and processor time
a request (of `--tokens` tokens). On a machine that others use too, compare low percentiles and the counts.
"""

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from charonia.entrypoints.default_model import ensure_default_model
from charonia.entrypoints.triton_server import TritonServer
from charonia_client import AsyncCharoniaClient
from frontends import model_changer
from service import processor_us, served, switches

PROMPT = [100 + 7 * i for i in range(128)]


class Candidate:
    """One of the servers, and what was measured of it."""

    def __init__(self, name: str, server: TritonServer) -> None:
        self.name = name
        self.server = server
        self.seconds: list[float] = []
        self.us: dict[str, float] = {}
        self.switches: dict[str, float] = {}

    async def ask(self, options: argparse.Namespace, count: int) -> list[float]:
        """Seconds to the first response of requests one after the other."""
        client = AsyncCharoniaClient(self.server.grpc_url)
        found = []
        for _ in range(count):
            await asyncio.sleep(options.gap_ms / 1e3)
            begin = time.perf_counter()
            stream = client.stream(token_ids=PROMPT, max_tokens=options.tokens, ignore_eos=True)
            await anext(stream)
            found.append(time.perf_counter() - begin)
            async for _ in stream:
                pass
        await client.aclose()
        return found

    def measure(self, options: argparse.Namespace) -> None:
        """A block of requests."""
        asyncio.run(self.ask(options, 10))
        us, switched = processor_us(self.server), switches(self.server)
        self.seconds += asyncio.run(self.ask(options, options.block))
        for total, after, before in (
            (self.us, processor_us(self.server), us),
            (self.switches, switches(self.server), switched),
        ):
            for kind, value in after.items():
                total[kind] = total.get(kind, 0.0) + value - before.get(kind, 0.0)

    def line(self) -> str:
        """A row of the table."""
        ordered = sorted(self.seconds)
        low, p10 = 1e3 * ordered[0], 1e3 * ordered[len(ordered) // 10]
        kinds = ("server", "stubs", "engine")
        each = "  ".join(
            f"{self.switches.get(kind, 0) / len(ordered):6.1f} {self.us.get(kind, 0) / len(ordered):6.0f}"
            for kind in kinds
        )
        return f"{self.name:8} {low:7.3f} {p10:7.3f} {1e3 * statistics.median(ordered):7.3f}    {each}"


def main() -> None:
    """Measure both by turns, and print a line each."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="first-") as folder, servers(Path(folder), options) as found:
        candidates = [Candidate(name, server) for name, server in found.items()]
        for _ in range(max(1, options.requests // options.block)):
            for candidate in candidates:
                candidate.measure(options)
        print(f"{options.instances} instances, {options.step_ms:g} ms a step; ms to the first response")
        print(f"{'':8} {'min':>7} {'p10':>7} {'p50':>7}    switches, us: server, stubs, engine")
        for candidate in candidates:
            print(candidate.line())
        ours, bare = (statistics.median(candidate.seconds) * 1e3 for candidate in candidates)
        print(f"ours less bare, less a step: {ours - bare - options.step_ms:.3f} ms at the median")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=300, help="to each server (default 300)")
    parser.add_argument("--block", type=int, default=50, help="requests to one server in a row (default 50)")
    parser.add_argument("--tokens", type=int, default=4, help="of each request (default 4)")
    parser.add_argument("--gap-ms", type=float, default=2.0, help="between requests (default 2)")
    parser.add_argument("--step-ms", type=float, default=0.5, help="time of an engine step (default 0.5)")
    parser.add_argument("--instances", type=int, default=1)
    parser.add_argument("--server-args", default="", help="further arguments of both tritonservers")
    return parser.parse_args()


@contextlib.contextmanager
def servers(root: Path, options: argparse.Namespace) -> Iterator[dict[str, TritonServer]]:
    """Both servers, ready."""
    settings = {"model": str(ensure_default_model()), "max_num_seqs": 64}
    found = {}
    with contextlib.ExitStack() as stack:
        for name in ("ours", "bare"):
            (root / name).mkdir()
            options.bare = name == "bare"
            change = model_changer(options)
            found[name] = stack.enter_context(
                served(
                    root / name,
                    settings,
                    instances=options.instances,
                    server_args=options.server_args,
                    change_model=lambda text, change=change: change(text).replace(
                        "TOKENS = 256", f"TOKENS = {options.tokens}"
                    ),
                )
            )
        yield found


if __name__ == "__main__":
    main()
