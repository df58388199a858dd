"""The engine on the shared workloads (`workloads.py`), against the peer's figures and the targets.

    python benchmarks/gpu/engine.py qwen06b --only chat-1000 128/256x64 --out out.jsonl max_num_seqs=256

Prints a line of JSON for the start-up and for each workload, then a table. Settings are those of `LLM`.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
"""Before the heavy imports: they are part of what starting an engine costs."""

sys.path.insert(0, str(Path(__file__).resolve().parent))

from workloads import MODELS, SUITES, TINY, Item, Workload  # noqa: E402

Row = dict[str, Any]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; `settings` becomes a dict of engine settings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="engine settings")
    parser.add_argument("--only", nargs="+", default=[], metavar="LABEL", help="run these workloads alone")
    parser.add_argument("--out", type=Path, help="write the lines of JSON here too")
    parser.add_argument("--enforce-eager", action="store_true", help="without CUDA graphs")
    parser.add_argument(
        "--tiny", action="store_true", help="a toy of a model and of each workload: a trial run"
    )
    options = parser.parse_intermixed_args(arguments)
    # `--only A B key=value` takes the settings with it.
    given = options.settings + [word for word in options.only if "=" in word]
    options.only = [word for word in options.only if "=" not in word]
    known = [workload.label for workload in SUITES[options.model]]
    for label in options.only:
        if label not in known:
            parser.error(f"no workload {label!r}; there are {', '.join(known)}")
    options.settings = {}
    for word in given:
        key, sign, value = word.partition("=")
        if not sign:
            parser.error(f"{word!r} is not KEY=VALUE")
        options.settings[key] = _value(value)
    return options


def _value(text: str) -> Any:
    """A JSON value, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def engine_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What `LLM` gets; settings of the command line win."""
    settings: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "max_model_len": 17408 if options.model == "llama8b" else 4096,
        "gpu_memory_utilization": 0.9,
        "enforce_eager": options.enforce_eager,
        "max_num_seqs": 512,
    }
    if options.tiny:
        settings |= {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return settings | options.settings


def items_of(workload: Workload, repeat: int, tiny: bool) -> list[Item]:
    """A workload's requests; other tokens in every repeat, so that no prefix is found again."""
    items = workload.make()
    if tiny:
        items = [(prompt[:24], min(count, 8)) for prompt, count in items[:12]]
    return [([token + repeat for token in prompt], count) for prompt, count in items] if repeat else items


def generate(llm: Any, items: list[Item]) -> float:
    """Run a batch; its seconds. Everything asked for must come."""
    from charonia import SamplingParams

    prompts = [{"prompt_token_ids": prompt} for prompt, _ in items]
    params = [
        SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        for _, count in items
    ]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    got = [len(output.outputs[0].token_ids) for output in outputs]
    if got != [count for _, count in items]:
        raise RuntimeError(f"asked for {sum(count for _, count in items)} tokens, got {sum(got)}")
    return seconds


def run_workload(llm: Any, model: str, workload: Workload, tiny: bool) -> Row:
    """The best of its repeats, with where the time of that one's steps went."""
    best: tuple[float, Any] | None = None
    for repeat in range(workload.repeats):
        items = items_of(workload, repeat, tiny)
        before = replace(llm.step_times())
        seconds = generate(llm, items)
        if best is None or seconds < best[0]:
            best = (seconds, llm.step_times().since(before))
    assert best is not None
    seconds, times = best
    num_in, num_out = sum(len(prompt) for prompt, _ in items), sum(count for _, count in items)
    per_step = 1e3 / max(1, times.steps)
    return {
        "engine": "charonia",
        "model": model,
        "workload": workload.label,
        "s": round(seconds, 3),
        "out_tok_s": round(num_out / seconds, 1),
        "tot_tok_s": round((num_in + num_out) / seconds, 1),
        "peer_s": workload.peer_s,
        "target_s": workload.target_s,
        "ratio": round(workload.peer_s / seconds, 3),
        "steps": times.steps,
        "step_ms": {
            name: round(getattr(times, name) * per_step, 3)
            for name in ("schedule", "launch", "wait", "update")
        }
        | {"all": round(seconds * per_step, 3)},
    }


def table(rows: list[Row]) -> str:
    """The figures beside the peer's and the targets."""
    head = (
        f"{'workload':<24}{'s':>9}{'target':>9}{'peer':>9}{'ratio':>7}  {'':<5}{'out tok/s':>11}"
        f"{'steps':>7}{'ms/step':>9}{'cpu ms':>8}"
    )
    lines = [head]
    for row in rows:
        step = row["step_ms"]
        met = "met" if row["s"] <= row["target_s"] else "-"
        lines.append(
            f"{row['workload']:<24}{row['s']:>9.3f}{row['target_s']:>9.3f}{row['peer_s']:>9.3f}{row['ratio']:>7.2f}"
            f"  {met:<5}{row['out_tok_s']:>11,.0f}{row['steps']:>7}{step['all']:>9.3f}"
            f"{step['all'] - step['wait']:>8.3f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Start the engine, run the suite."""
    options = parse(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="charonia-bench-") as directory:
        changes = TINY if options.tiny else {}
        (Path(directory) / "config.json").write_text(json.dumps(MODELS[options.model] | changes))
        from charonia import LLM

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        with LLM(directory, **engine_settings(options)) as llm:
            startup = {
                "engine": "charonia",
                "model": options.model,
                "startup_s": round(time.perf_counter() - STARTED, 2),
            }
            lines = [startup]
            print(json.dumps(startup), flush=True)
            generate(llm, [([5] * 64, 16)] * 4)
            for workload in SUITES[options.model]:
                if options.only and workload.label not in options.only:
                    continue
                rows.append(run_workload(llm, options.model, workload, options.tiny))
                lines.append(rows[-1])
                print(json.dumps(rows[-1]), flush=True)
                if options.out is not None:
                    options.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
            import torch

            if torch.cuda.is_available():
                free, total = torch.cuda.mem_get_info()
                print(f"memory in use {(total - free) / total:.4f}", flush=True)
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
