"""Sampling kernels on a GPU: correctness at production sizes, then launch parameters and times.

    PYTHONPATH=engine:kernels:client:tests python benchmarks/gpu/sampling.py --out sampling.json

Logits lie in a pool of buffers that the launches of a CUDA graph go round in; the pool is larger than the L2 cache
except at small batches, whose logits are in the cache in an engine too, just written by the last matrix product.
`floor` is the time in which the logits are read once at 2.97 TB/s.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from charonia_kernels.draw_outcome import DrawOutcome
from charonia_kernels.gpu import logit_rules, penalties, sampling
from charonia_kernels.gpu._launch import INTERPRETED, traits
from charonia_kernels.gpu.logprobs import logprobs, logprobs_config
from charonia_kernels.gpu.sampling import SampleScratch, sample, sample_config
from charonia_kernels.gpu.sampling_filters import FilterConfig, filter_config, filter_thresholds
from charonia_kernels.logit_rule_layout import build_rules
from charonia_kernels.reference import logit_rules as rules_reference
from charonia_kernels.reference import logprobs as logprobs_reference
from charonia_kernels.reference import penalties as penalties_reference
from charonia_kernels.reference import sampling as reference
from charonia_kernels.sampling_params import INVERSE_TEMPERATURE, NUM_PARAMS, TOP_P, pack

DEVICE = torch.device("cpu" if INTERPRETED else "cuda:0")
BANDWIDTH = 2.97e12
POOL_BYTES = 160 << 20
MAX_LAUNCHES = 64


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    vocabs: tuple[int, ...] = (128256, 151936)
    batches: tuple[int, ...] = (1, 8, 64, 256, 512)
    length: int = 1024


TINY = Sizes((4112, 5008), (1, 2), 40)


def ints(values: Iterable[int]) -> torch.Tensor:
    """An int32 tensor on the device."""
    return torch.tensor(list(values), dtype=torch.int32, device=DEVICE)


def table(*rows: dict[str, Any]) -> torch.Tensor:
    """Parameters of rows."""
    return ints(word for row in rows for word in pack(**row)).view(-1, NUM_PARAMS)


def random_logits(
    batch: int, vocab: int, dtype: torch.dtype, scale: float = 3.0, seed: int = 0
) -> torch.Tensor:
    """[batch, vocab], normal."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(batch, vocab, generator=generator, device=DEVICE) * scale).to(dtype)


# Correctness


def check_sampling(vocab: int, dtype: torch.dtype) -> None:
    """Greedy tokens are exact; drawn ones have the reference's best score; configurations agree."""
    logits = random_logits(6, vocab, dtype)
    logits[4, vocab - 1], logits[5] = math.nan, -math.inf
    rows, seq_lens = ints([0, 1, 2, 1, 1, 1]), ints([5, 6, 70000, 9, 1, 1])
    params = table({}, {"temperature": 0.7, "seed": 11}, {"temperature": 1.5, "seed": -5})
    result = sample(logits, rows, seq_lens, params)
    unusable = [DrawOutcome.NOT_FINITE, DrawOutcome.EXCLUDED]
    assert result.outcomes.tolist() == 4 * [DrawOutcome.DRAWN] + unusable, result.outcomes
    ids = torch.arange(vocab, device=DEVICE)
    greedy = int(torch.where(logits[0] == logits[0].amax(), ids, vocab).amin())
    assert int(result.tokens[0]) == greedy, (int(result.tokens[0]), greedy)
    scores = reference.scores(logits, rows, seq_lens, params)[:4]
    loss = scores.amax(dim=-1) - scores.gather(-1, result.tokens[:4].long()[:, None])[:, 0]
    assert float(loss.max()) <= 1e-3, loss
    tiles = -(-vocab // 2048)
    for config in (sampling.SampleConfig(1, tiles, 4, False), sampling.SampleConfig(tiles, 1, 2, False)):
        again = sample(logits, rows, seq_lens, params, config=config)
        assert torch.equal(again.tokens[:4], result.tokens[:4]), config
        assert torch.equal(again.outcomes, result.outcomes), config


def check_distribution() -> None:
    """Chi-square of draws over 7 tokens; 22.5 is passed once in a thousand."""
    number = 50 if INTERPRETED else 20000
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5], device=DEVICE)
    rows, positions = ints([0] * number), ints(range(number))
    tokens = sample(logits.expand(number, 7), rows, positions, table({"temperature": 0.8, "seed": 1})).tokens
    expected = (logits.double() / 0.8).softmax(dim=-1) * number
    counts = torch.bincount(tokens.long(), minlength=7).double()
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert chi < 22.5, (chi, counts, expected)


FILTERS: list[dict[str, Any]] = [
    {"top_k": 50}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 1000, "min_p": 1e-3},
    {"top_p": 0.999}, {"top_k": 5000}, {"min_p": 1e-5, "top_p": 0.95}, {"top_p": 0.01}, {},
]  # fmt: skip


def check_filters(vocab: int, dtype: torch.dtype, scale: float) -> None:
    """Thresholds of top_k and min_p are exact; top_p keeps the mass that it should up to 1e-5."""
    logits = random_logits(len(FILTERS), vocab, dtype, scale)
    params, rows = table(*[{"temperature": 0.8, **item} for item in FILTERS]), ints(range(len(FILTERS)))
    actual = filter_thresholds(logits, rows, params)
    expected = reference.filter_thresholds(logits, rows, params)
    inverse = reference.float_column(params, rows, INVERSE_TEMPERATURE)
    for i, item in enumerate(FILTERS):
        if actual[i] == expected[i]:
            continue
        assert "top_p" in item, (item, actual[i], expected[i])
        scaled = logits[i].float() * inverse[i]
        first = reference.filter_thresholds(logits[i : i + 1], ints([0]), _without_top_p(params[i : i + 1]))[
            0
        ]
        weights = torch.where(scaled >= first, (scaled.double() - scaled.amax()).exp(), 0.0)
        before = float(weights[scaled > actual[i]].sum() / weights.sum())
        through = float(weights[scaled >= actual[i]].sum() / weights.sum())
        p = item["top_p"]
        assert before < p + 1e-5 and through > p - 1e-5, (item, before, through, actual[i], expected[i])


def _without_top_p(params: torch.Tensor) -> torch.Tensor:
    changed = params.clone()
    changed[:, TOP_P] = table({})[0, TOP_P]
    return changed


def check_penalties(vocab: int, length: int) -> None:
    """Penalised logits are the reference's, and the tables are zeros again."""
    logits = random_logits(5, vocab, torch.float32)
    tokens = torch.randint(0, vocab, (3, length), dtype=torch.int32, device=DEVICE)
    tokens[1] %= 97
    params = table(
        {"repetition": 1.2, "num_prompt": length // 2},
        {"frequency": 0.3, "presence": 0.5, "num_prompt": length // 3},
        {"repetition": 1.1, "frequency": 0.1, "num_prompt": length},
    )
    rows, seq_lens = ints([0, 1, 2, 1, 0]), ints([length, length, length, length // 2, 1])
    counts = penalties.allocate_counts(2, vocab, DEVICE)
    expected = logits.double()
    penalties_reference.apply_penalties(expected, rows, seq_lens, tokens, params)
    penalties.apply_penalties(logits, rows, seq_lens, tokens, params, counts)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    assert not counts.any()


def check_rules(vocab: int) -> None:
    """Bias, masks, stop ids and bad words are the reference's."""
    sets = [
        build_rules(vocab, bias={3: 1.5, vocab - 1: -9.0}, allowed=range(0, vocab, 3)),
        build_rules(vocab, bad_words=[[9], [3, 4], [1, 2, 3, 11]], stop_ids=[1, 2]),
    ]
    pool: list[int] = []
    records: list[int] = []
    for entry, rules in enumerate(sets):
        records += rules.records(entry, len(pool))
        pool += rules.words
    logits = random_logits(2, vocab, torch.float32)
    expected = logits.double()
    params = table({"num_prompt": 1, "min_tokens": 9}, {"num_prompt": 1, "min_tokens": 9})
    tokens = ints([7, 1, 2, 3] * 2).view(2, 4)
    args = ints([0, 1]), ints([4, 4]), tokens, params, ints(records).view(-1, 4), ints(pool)
    rules_reference.apply_logit_rules(expected, *args)
    logit_rules.apply_logit_rules(logits, *args)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-6, atol=1e-6)


def check_logprobs(vocab: int, dtype: torch.dtype) -> None:
    """Log-probabilities and ranks are the reference's."""
    logits, tokens = random_logits(3, vocab, dtype), ints([0, 5, vocab - 1])
    result = logprobs(logits, tokens, 20)
    expected = logprobs_reference.logprobs(logits.double(), tokens, 20)
    own, rank, values = expected.own, expected.rank, expected.top_values
    torch.testing.assert_close(result.own.double(), own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.top_values.double(), values, rtol=1e-5, atol=1e-5)
    assert torch.equal(result.rank, rank)


def checks(sizes: Sizes) -> list[str]:
    """Names of the checks that failed, with their messages."""
    work: list[tuple[str, Callable[[], None]]] = [("distribution", check_distribution)]
    for vocab in (*sizes.vocabs, sizes.vocabs[0] - 13):
        for dtype in (torch.bfloat16, torch.float32):
            name = f"{vocab} {dtype}"
            work.append((f"sampling {name}", lambda v=vocab, d=dtype: check_sampling(v, d)))
            work.append((f"logprobs {name}", lambda v=vocab, d=dtype: check_logprobs(v, d)))
            work += [
                (f"filters {name} {scale}", lambda v=vocab, d=dtype, s=scale: check_filters(v, d, s))
                for scale in (0.3, 1.5, 6.0)
            ]
        work.append((f"penalties {vocab}", lambda v=vocab: check_penalties(v, sizes.length * 3 + 1)))
        work.append((f"rules {vocab}", lambda v=vocab: check_rules(v)))
    failed = []
    for name, check in work:
        try:
            check()
        except Exception as error:  # the sweep goes on
            failed.append(f"{name}: {type(error).__name__}: {str(error)[:600]}")
    return failed


# Times


def measure(call: Callable[[int], object], copies: int) -> float:
    """Median microseconds of a launch; `call(i)` works on buffer i. Captured once, replayed nine times."""
    if INTERPRETED:
        start = time.perf_counter()
        call(0)
        return (time.perf_counter() - start) * 1e6
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    launches = max(16, copies)
    with torch.cuda.graph(graph):
        for i in range(launches):
            call(i % copies)
    graph.replay()
    times = []
    for _ in range(9):
        start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start_event.record()
        graph.replay()
        end_event.record()
        end_event.synchronize()
        times.append(start_event.elapsed_time(end_event) * 1e3 / launches)
    return statistics.median(times)


def num_copies(batch: int, vocab: int, itemsize: int) -> int:
    """Buffers of a pool."""
    return max(2, min(MAX_LAUNCHES, POOL_BYTES // (batch * vocab * itemsize)))


class Table:
    """Rows of the result. A configuration that fails is a row too."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        case: dict[str, Any],
        config: object,
        floor_bytes: float,
        call: Callable[[int], object],
        copies: int,
    ) -> None:
        """Measure one configuration. config: launch parameters, or a name."""
        row = {**case, "config": config if isinstance(config, str) else asdict(config)}  # type: ignore[call-overload]
        try:
            row["us"] = round(measure(call, copies), 2)
            row["floor_us"] = round(floor_bytes / BANDWIDTH * 1e6, 2)
        except Exception as error:  # the sweep goes on
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        self.rows.append(row)

    def report(self) -> None:
        """The best configuration of each case, the default's time beside it."""
        cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in self.rows:
            key = tuple(row[name] for name in ("op", "dtype", "vocab", "batch"))
            cases.setdefault(key, []).append(row)
        print(
            f"{'op':<22}{'dtype':<9}{'vocab':>7}{'batch':>6}{'default':>9}{'best':>9}{'floor':>8}  best configuration"
        )
        for key, rows in cases.items():
            good = [row for row in rows if "us" in row and row["config"] != "torch"]
            for row in rows:
                if "error" in row:
                    print(f"  failed: {key} {row['config']}: {row['error']}")
            if not good:
                continue
            best = min(good, key=lambda row: row["us"])
            default = good[0]["us"] if good[0].get("default") else math.nan
            peer = next((row["us"] for row in rows if row["config"] == "torch" and "us" in row), None)
            values = " ".join(
                f"{name}={value}" for name, value in best["config"].items() if name != "use_pdl"
            )
            print(
                f"{key[0]:<22}{key[1]:<9}{key[2]:>7}{key[3]:>6}{default:>9.1f}{best['us']:>9.1f}"
                f"{best['floor_us']:>8.1f}  {values}" + (f"  (torch {peer:.1f})" if peer else "")
            )


PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8, "seed": 5},
    "top-k 50 top-p 0.9": {"temperature": 0.8, "seed": 5, "top_k": 50, "top_p": 0.9},
    "top-p 0.95 flat": {"temperature": 3.0, "seed": 5, "top_p": 0.95},
}


def filter_configs(vocab: int) -> list[FilterConfig]:
    """Candidates, the default first."""
    default = filter_config(vocab, traits(DEVICE))
    if INTERPRETED:
        return [default]
    found = [default]
    for chunk, warps, registers, room in (
        (2048, 4, 80, 8192), (8192, 8, 128, 8192), (4096, 8, 80, 8192), (4096, 8, 128, 16384),
        (8192, 16, 64, 8192), (4096, 4, 128, 8192), (2048, 4, 80, 16384),
    ):  # fmt: skip
        chunks = 1 << (-(-vocab // chunk) - 1).bit_length()
        keep = min(chunk // 8, room // chunks)
        found.append(FilterConfig(chunk, keep, warps, registers, room // 1024, default.use_pdl))
    return found if vocab == Sizes().vocabs[0] else found[:4]


def sample_configs(batch: int, vocab: int) -> list[sampling.SampleConfig]:
    """Candidates, the default first."""
    device = traits(DEVICE)
    default = sample_config(batch, vocab, device)
    found = [default]
    for per_sm in (8, 16):
        for warps in (2, 4):
            config = replace(sample_config(batch, vocab, device, per_sm), num_warps=warps)
            if config not in found:
                found.append(config)
    return found[:2] if INTERPRETED else found


def sweep(result: Table, sizes: Sizes, batch: int, vocab: int, dtype: torch.dtype) -> None:
    """All samplers at one shape."""
    copies = num_copies(batch, vocab, dtype.itemsize)
    pool = random_logits(copies * batch, vocab, dtype).view(copies, batch, vocab)
    rows, seq_lens = ints(range(batch)), ints([100] * batch)
    scratch = SampleScratch.allocate(batch, DEVICE)
    out = sampling.SampledTokens(ints([0] * batch), ints([0] * batch))
    room = torch.empty(batch, device=DEVICE)
    size = batch * vocab * dtype.itemsize
    base = {"dtype": str(dtype).removeprefix("torch."), "vocab": vocab, "batch": batch}
    for name, values in PARAMS.items():
        params = table(*[{**values, "seed": i} for i in range(batch)])
        filtered = "top_p" in values
        thresholds = filter_thresholds(pool[0], rows, params) if filtered else None
        if filtered:
            for i, config in enumerate(filter_configs(vocab)):
                result.add(
                    {"op": f"filter {name[:14]}", **base, "default": i == 0}, config, size,
                    lambda n, c=config, p=params: filter_thresholds(pool[n], rows, p, out=room, config=c),
                    copies,
                )  # fmt: skip
        if "flat" in name:
            continue
        for i, config in enumerate(sample_configs(batch, vocab)):
            result.add(
                {"op": f"sample {name[:14]}", **base, "default": i == 0}, config, size,
                lambda n, c=config, p=params, t=thresholds: sample(
                    pool[n], rows, seq_lens, p, t, out=out, scratch=scratch, config=c
                ),
                copies,
            )  # fmt: skip
        if name == "greedy":
            result.add(
                {"op": "sample greedy", **base}, "torch", size, lambda n: pool[n].argmax(dim=-1), copies
            )
        if name == "temperature":
            result.add(
                {"op": "sample temperature", **base}, "torch", size, lambda n: _torch_draw(pool[n]), copies
            )
    if dtype == torch.float32:
        sweep_penalties(result, sizes, pool, base)
    config = logprobs_config(traits(DEVICE))
    tokens = ints(range(batch))
    result.add(
        {"op": "logprobs 0", **base, "default": True}, config, size,
        lambda n: logprobs(pool[n], tokens, 0), copies,
    )  # fmt: skip
    result.add(
        {"op": "logprobs 20", **base, "default": True}, config, size,
        lambda n: logprobs(pool[n], tokens, 20), copies,
    )  # fmt: skip


def _torch_draw(logits: torch.Tensor) -> torch.Tensor:
    probabilities = (logits.float() / 0.8).softmax(dim=-1)
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)


def sweep_penalties(result: Table, sizes: Sizes, pool: torch.Tensor, base: dict[str, Any]) -> None:
    """Penalties over contexts of `sizes.length` tokens, their floor being 100 bytes a token; a mask for each row."""
    copies, batch, vocab = pool.shape
    rows, seq_lens = ints(range(batch)), ints([sizes.length] * batch)
    tokens = torch.randint(0, vocab, (batch, sizes.length), dtype=torch.int32, device=DEVICE)
    params = table(*[{"repetition": 1.1, "frequency": 0.1, "num_prompt": sizes.length // 2}] * batch)
    use_pdl = traits(DEVICE).has_pdl
    for i, (tables, block, warps) in enumerate(
        ((64, 2048, 16), (64, 1024, 8), (132, 2048, 16), (264, 1024, 8))
    ):
        if i > 1 and batch <= 64:
            continue
        programs = min(tables, batch)
        counts = torch.zeros((programs, vocab), dtype=torch.int32, device=DEVICE)
        config = penalties.PenaltyConfig(programs, block, warps, use_pdl)
        result.add(
            {"op": f"penalties {sizes.length}", **base, "default": i == 0}, config, batch * sizes.length * 100.0,
            lambda n, c=config, t=counts: penalties.apply_penalties(
                pool[n], rows, seq_lens, tokens, params, t, config=c
            ),
            copies,
        )  # fmt: skip
    mask = build_rules(vocab, allowed=range(0, vocab, 2))
    records = ints(word for entry in range(batch) for word in mask.records(entry, 0)).view(-1, 4)
    words = ints(mask.words)
    result.add(
        {"op": "rules mask", **base, "default": True}, logit_rules.rules_config(batch, vocab, traits(DEVICE)),
        batch * vocab * 8.0,
        lambda n: logit_rules.apply_logit_rules(pool[n], rows, seq_lens, tokens, params, records, words), copies,
    )  # fmt: skip


def compile_all(sizes: Sizes) -> None:
    """Launch every specialisation once, in threads. Errors come again, and are reported, in the sweep."""
    work: list[Callable[[], object]] = []
    params, rows = table(PARAMS["top-k 50 top-p 0.9"]), ints([0])
    none = torch.full((1,), -math.inf, device=DEVICE)
    odd = sizes.vocabs[0] - 13
    for vocab in (*sizes.vocabs, odd):
        work += [partial(check_penalties, vocab, 100), partial(check_rules, vocab)]
        for dtype in (torch.bfloat16, torch.float32):
            logits = random_logits(1, vocab, dtype)
            work.append(partial(logprobs, logits, rows, 20))
            filters = filter_configs(vocab)
            if vocab == odd or (dtype == torch.float32 and vocab != sizes.vocabs[0]):
                filters = filters[:1]
            work += [partial(filter_thresholds, logits, rows, params, config=config) for config in filters]
            for warps in (2, 4):
                config = replace(sample_config(1, vocab, traits(DEVICE)), num_warps=warps)
                for thresholds in (None, none):
                    work.append(partial(sample, logits, rows, rows, params, thresholds, config=config))
    with ThreadPoolExecutor(16) as threads:
        for future in [threads.submit(_quietly, item) for item in work]:
            future.result()


def _quietly(call: Callable[[], object]) -> None:
    try:
        call()
    except Exception as error:
        print(f"warm-up: {type(error).__name__}: {str(error)[:200]}")


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write all rows as JSON")
    parser.add_argument("--seconds", type=float, default=80.0, help="no new shape is begun after that")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, as in Triton's interpreter")
    args = parser.parse_args()
    start = time.perf_counter()
    sizes = TINY if args.dry_run else Sizes()
    if not INTERPRETED:
        compile_all(sizes)
        torch.cuda.synchronize()
    print(f"compiled after {time.perf_counter() - start:.1f} s")
    failed = checks(sizes)
    print("\n".join(f"CHECK FAILED: {line}" for line in failed) or "all checks passed")
    print(f"checked after {time.perf_counter() - start:.1f} s", flush=True)
    result = Table()
    for dtype in (torch.bfloat16, torch.float32):
        for vocab in sizes.vocabs if dtype == torch.bfloat16 else sizes.vocabs[:1]:
            for batch in sizes.batches:
                if time.perf_counter() - start < args.seconds:
                    sweep(result, sizes, batch, vocab, dtype)
                else:
                    print(f"no time left for {dtype} {vocab} {batch}")
    result.report()
    print(f"done after {time.perf_counter() - start:.1f} s")
    if args.out:
        name = "interpreter" if INTERPRETED else torch.cuda.get_device_name()
        args.out.write_text(json.dumps({"device": name, "failed": failed, "rows": result.rows}, indent=1))


if __name__ == "__main__":
    main()
