"""What the way from the engine to the clients carries: a real server, real frontends, an engine without a model.

    python benchmarks/serving/frontends.py --step-ms 10 --streams 64 256 --instances 1

Each line: responses and tokens a second that reached the clients, tokens a second that the engine offered, and
processor time a response by process. The clients are processes of `charonia bench serve`. With `--bare` the model is
the least that can answer (`bare_model.py`): what Triton and its Python stub take by themselves.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from charonia.entrypoints.default_model import ensure_default_model
from charonia.entrypoints.serve import default_instances
from charonia.entrypoints.triton_server import TritonServer
from service import bench_serve, processor_us, served

HERE = Path(__file__).resolve().parent
_ATTACH = "connect=AsyncEngine.attach"
KINDS = ("server", "stubs", "engine")


def main() -> None:
    """Measure every number of streams, and print a line each."""
    options = parse()
    settings = {
        "model": str(ensure_default_model()),
        "max_num_seqs": 512,
        "max_num_batched_tokens": 8192,
        "stream_interval": options.stream_interval,
    }
    with (
        tempfile.TemporaryDirectory(prefix="frontends-") as folder,
        served(
            Path(folder), settings, instances=options.instances, senders=options.senders,
            server_args=options.server_args, change_model=model_changer(options),
        ) as server,
    ):  # fmt: skip
        print(f"{os.cpu_count()} cores, {options.instances} instances of {options.senders} senders")
        columns = "  ".join(f"{kind:>6}" for kind in (*KINDS, "client"))
        print(f"streams  responses/s   tokens/s    offered   us a response: {columns}")
        for streams in options.streams:
            print(measure(server, Path(folder), streams, options), flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[64])
    parser.add_argument("--step-ms", type=float, default=10.0, help="time of an engine step (default 10)")
    parser.add_argument("--instances", type=int, default=default_instances())
    parser.add_argument("--senders", type=int, default=2, help="sender threads of an instance (default 2)")
    parser.add_argument("--tokens", type=int, default=256, help="of each request (default 256)")
    parser.add_argument("--requests", type=int, default=4, help="of each stream (default 4)")
    parser.add_argument("--workers", type=int, default=1, help="load generating processes (default 1)")
    parser.add_argument("--stream-interval", type=int, default=1)
    parser.add_argument("--server-args", default="", help="further arguments of tritonserver")
    parser.add_argument("--bare", action="store_true")
    return parser.parse_args()


def model_changer(options: argparse.Namespace) -> Callable[[str], str]:
    """What makes the packaged model.py attach to a paced engine, or puts the bare model in its place."""

    def change(text: str) -> str:
        if options.bare:
            return (HERE / "bare_model.py").read_text()
        if _ATTACH not in text:
            raise RuntimeError(f"model.py has no {_ATTACH!r} to put another engine in")
        command = [sys.executable, str(HERE / "paced_engine.py"), f"{options.step_ms:g}"]
        partial = f"connect=__import__('functools').partial(AsyncEngine.attach, engine_command={command!r})"
        return text.replace(_ATTACH, partial)

    return change


def measure(server: TritonServer, root: Path, streams: int, options: argparse.Namespace) -> str:
    """One line of the table."""
    before = processor_us(server)
    (run,) = bench_serve(
        root, f"grpc://{server.grpc_url}", "--concurrency", streams,
        "--num-prompts", streams * options.requests, "--input-len", 16,
        "--output-len", options.tokens, "--workers", options.workers, "--no-count-tokens",
    )  # fmt: skip
    spent = {kind: us - before.get(kind, 0.0) for kind, us in processor_us(server).items()}
    responses = run["num_responses"]
    costs = [spent.get(kind, 0.0) / responses for kind in KINDS] + [run["generator_us_per_response"]]
    offered = "-" if options.bare else f"{1e3 * streams / options.step_ms:,.0f}"
    columns = "  ".join(f"{cost:6.0f}" for cost in costs)
    return (
        f"{streams:7} {responses / run['duration_s']:12,.0f} {run['output_throughput']:10,.0f} {offered:>10}"
        f"{'':18}{columns}"
    )


if __name__ == "__main__":
    main()
