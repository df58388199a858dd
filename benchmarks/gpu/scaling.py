"""Decode speed against the number of rows and against the context, with the floor beside it.

    python benchmarks/gpu/scaling.py llama8b --out scaling.json

The floor is the time that a step's bytes take at the speed of a device copy, or its operations at that of large matrix
products, whichever is more: weights once, keys and values of every row once.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from charonia.config import EngineConfig
from charonia.entrypoints.bench.steps import measure_rows
from charonia.model_config import ModelConfig
from charonia.serving.engine_builder import build_engine
from charonia.serving.input_processor import InputProcessor
from workloads import MODELS

BYTES_PER_S = 2.97e12
OPERATIONS_PER_S = 700e12
ROWS = [(rows, 256) for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)]
CONTEXTS = [(1, 1024), (1, 4096), (1, 16384), (1, 65536), (16, 1024), (16, 4096), (16, 16384)]
STEPS = 24


def floor_ms(model: dict[str, Any], rows: int, keys: float) -> float:
    """Milliseconds of a step at the ceilings. keys: of each row."""
    hidden, inner, heads = model["hidden_size"], model["intermediate_size"], model["num_attention_heads"]
    kv_heads, dim, layers = model["num_key_value_heads"], model["head_dim"], model["num_hidden_layers"]
    per_layer = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * inner
    weights = layers * per_layer + hidden * model["vocab_size"]
    kv_bytes = 2 * 2 * layers * kv_heads * dim * keys * rows
    operations = 2 * weights * rows + 4 * layers * heads * dim * keys * rows
    return 1e3 * max((2 * weights + kv_bytes) / BYTES_PER_S, operations / OPERATIONS_PER_S)


def main() -> None:
    """Measure, and print a line each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = MODELS[args.model]
    limit = min(model["max_position_embeddings"], 66_560)
    results = []
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(model))
        config = EngineConfig(
            model=directory,
            load_format="dummy",
            max_model_len=limit,
            max_num_seqs=512,
            skip_tokenizer_init=True,
        )
        model_config = ModelConfig.from_dir(directory)
        core, _ = build_engine(config, model_config)
        inputs = InputProcessor(config, model_config, None)
        print(f"{torch.cuda.get_device_name()}, {args.model}")
        print("  rows context   ms/step   device    floor  of floor     tok/s")
        for rows, context in ROWS + CONTEXTS:
            if context + 64 > limit:
                continue
            options = argparse.Namespace(context=context, steps=STEPS)
            cost = measure_rows(core, inputs, rows, options, vocab_size=100_000)
            floor = floor_ms(model, rows, context + STEPS / 2 + 8)
            results.append(
                {
                    "rows": rows,
                    "context": context,
                    "ms": cost.all,
                    "device_ms": cost.device,
                    "floor_ms": floor,
                }
            )
            device = cost.device or float("nan")
            print(f"{rows:6} {context:7} {cost.all:9.3f} {device:8.3f} {floor:8.3f} {floor / cost.all:9.0%} "
                  f"{1e3 * rows / cost.all:9,.0f}", flush=True)  # fmt: skip
        core.shutdown()
    if args.out:
        args.out.write_text(json.dumps({"model": args.model, "results": results}, indent=1))


if __name__ == "__main__":
    main()
