"""Streaming through Triton beside the engine alone, on a GPU: dummy weights, the real server, clients over gRPC.

    python benchmarks/serving/streaming.py llama8b --streams 64 256

Offline is `LLM.generate` of the same lengths in a process of its own. Throughput: as many requests at once as there
are streams, the best of `--repeats`; offline and streamed alike. TTFT: one request at a time, median, as the client
sees it; offline it is the time of `LLM.generate` of one token.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from charonia.entrypoints.serve import default_instances
from charonia.entrypoints.triton_server import TritonServer
from service import bench_serve, gateway, processor_us, served
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))
from workloads import MODELS, TINY

PROMPT_LEN = 128
SINGLE_REQUESTS = 40


def main() -> None:
    """Measure offline, then through the server, and print both."""
    options = parse()
    if options.offline:
        print(json.dumps(measure_offline(options)))
        return
    with tempfile.TemporaryDirectory(prefix="streaming-") as folder:
        root = Path(folder)
        options.directory = options.directory or make_model(root / "model", options.model, options.tiny)
        offline = offline_figures(options)
        streamed = measure_streamed(root, options)
    print(f"{options.model}, {PROMPT_LEN} + {options.output_len} tokens, {options.instances} instances")
    report("through Triton", options, offline, streamed)
    if options.gateway_workers:
        report(f"gateway, {options.gateway_workers} workers", options, offline, streamed["gateway"])
    if options.out:
        options.out.write_text(json.dumps({"offline": offline, "streamed": streamed}, indent=1))


def report(
    name: str, options: argparse.Namespace, offline: dict[str, float], figures: dict[str, Any]
) -> None:
    """Print the figures of one way to the engine."""
    for streams in options.streams:
        alone, through = offline[str(streams)], figures[str(streams)]
        print(
            f"{streams:5} streams: offline {alone:,.0f} tokens/s, {name} {through['tokens_s']:,.0f} "
            f"({through['tokens_s'] / alone:.1%}), {through['tokens_per_response']:.2f} tokens a response, "
            f"ITL p50 {through['itl_p50']:.2f} p99 {through['itl_p99']:.2f} ms, us a response {through['us']}"
        )
    print(f"TTFT, median: offline {offline['ttft_ms']:.2f} ms, {name} {figures['ttft_ms']:.2f} ms")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--instances", type=int, default=default_instances())
    parser.add_argument("--senders", type=int, default=2)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) // 4))
    parser.add_argument(
        "--gateway-workers", type=int, default=0, help="also through so many (default 0: not)"
    )
    parser.add_argument("--server-args", default="")
    parser.add_argument("--tiny", action="store_true", help="a trial without a GPU")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--offline", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The engine's settings, offline and served."""
    return {
        "model": str(options.directory),
        "load_format": "dummy",
        "max_model_len": 4096,
        "max_num_seqs": max(options.streams),
    }


def make_model(directory: Path, name: str, tiny: bool) -> Path:
    """A config.json, and a tokenizer that has a text for every token id of the model."""
    config = MODELS[name] | (TINY if tiny else {})
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġw{number}" for number in range(config["vocab_size"] - len(alphabet))]
    vocabulary = {token: number for number, token in enumerate([*alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def prompts(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Different prompts of token ids."""
    return [
        {"prompt_token_ids": [1000 + (seed * 7919 + i * 131 + k * 17) % 60_000 for k in range(PROMPT_LEN)]}
        for i in range(count)
    ]


def offline_figures(options: argparse.Namespace) -> dict[str, float]:
    """Those of `measure_offline`, from a process that is gone afterwards."""
    command = [sys.executable, __file__, *sys.argv[1:], "--offline", "--directory", str(options.directory)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr[-3000:])
    figures: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return figures


def measure_offline(options: argparse.Namespace) -> dict[str, float]:
    """Tokens a second by the number of streams, and the median time to the first token."""
    from charonia import LLM, SamplingParams

    figures: dict[str, float] = {}
    with LLM(**settings_of(options)) as llm:

        def seconds(count: int, max_tokens: int, seed: int) -> float:
            params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
            begin = time.perf_counter()
            llm.generate(prompts(count, seed), params, use_tqdm=False)
            return time.perf_counter() - begin

        seconds(2, 4, 99)
        for streams in options.streams:
            best = min(seconds(streams, options.output_len, seed) for seed in range(options.repeats))
            figures[str(streams)] = streams * options.output_len / best
        single = [seconds(1, 1, 1000 + seed) for seed in range(SINGLE_REQUESTS)]
        figures["ttft_ms"] = 1e3 * statistics.median(single)
    return figures


def measure_streamed(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The same through the server, and through a gateway in front of it."""
    with served(
        root, settings_of(options), instances=options.instances, senders=options.senders,
        server_args=options.server_args,
    ) as server:  # fmt: skip
        url = f"grpc://{server.grpc_url}"
        figures = measure_url(root, server, options, [url, "--no-count-tokens"])
        if options.gateway_workers:
            with gateway(server, options.gateway_workers) as process:
                url = f"http://127.0.0.1:{process.args[-1]}/v1"  # type: ignore[index]
                figures["gateway"] = measure_url(root, server, options, [url, "--backend", "openai"])
    return figures


def measure_url(
    root: Path, server: TritonServer, options: argparse.Namespace, where: list[str]
) -> dict[str, Any]:
    """Throughput by the number of streams, and the time to the first token."""
    figures: dict[str, Any] = {}
    for streams in options.streams:
        runs = []
        for seed in range(options.repeats):
            before = processor_us(server)
            (run,) = bench_serve(
                root, *where, "--concurrency", streams, "--num-prompts", streams, "--input-len", PROMPT_LEN,
                "--output-len", options.output_len, "--workers", min(options.workers, streams),
                "--vocab-size", 60_000, "--seed", seed,
            )  # fmt: skip
            run["us"] = {
                kind: round((us - before.get(kind, 0.0)) / run["num_responses"])
                for kind, us in processor_us(server).items()
            } | {"client": round(run["generator_us_per_response"])}
            runs.append(run)
        best = max(runs, key=lambda run: run["output_throughput"])
        figures[str(streams)] = {
            "tokens_s": best["output_throughput"],
            "all_tokens_s": [run["output_throughput"] for run in runs],
            "tokens_per_response": streams * options.output_len / best["num_responses"],
            "itl_p50": best["itl"]["p50"],
            "itl_p99": best["itl"]["p99"],
            "ttft_p50": best["ttft"]["p50"],
            "us": best["us"],
        }
    (run,) = bench_serve(
        root, *where, "--concurrency", 1, "--num-prompts", SINGLE_REQUESTS, "--input-len", PROMPT_LEN,
        "--output-len", 4, "--workers", 1, "--vocab-size", 60_000, "--seed", 77,
    )  # fmt: skip
    figures["ttft_ms"] = run["ttft"]["p50"]
    return figures


if __name__ == "__main__":
    main()
