"""Decode steps of models that no kernel was tuned with, against the floor of their bytes: looks for cliffs.

    python benchmarks/gpu/other_models.py --out other_models.json

Random weights of the models' shapes. A process for each; the floor is that of `scaling.py`, at `--bytes-per-s`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROWS = [
    (1, 256),
    (2, 256),
    (4, 256),
    (8, 256),
    (16, 256),
    (32, 256),
    (64, 256),
    (128, 256),
    (256, 256),
    (1, 7168),
    (16, 4096),
]
STEPS = 24


def decoder(
    architecture: str, hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, inner: int,
    vocabulary: int, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A config.json."""
    return {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | more


MODELS = {
    "SmolLM2 135M": decoder("LlamaForCausalLM", 576, 30, 9, 3, 64, 1536, 49152),
    "Llama 3.2 1B": decoder("LlamaForCausalLM", 2048, 16, 32, 8, 64, 8192, 128256),
    "Llama 3.2 3B": decoder("LlamaForCausalLM", 3072, 28, 24, 8, 128, 8192, 128256),
    "Qwen3 4B": decoder("Qwen3ForCausalLM", 2560, 36, 32, 8, 128, 9728, 151936),
    "Gemma 3 4B": decoder(
        "Gemma3ForCausalLM", 2560, 34, 8, 4, 256, 10240, 262208, sliding_window=1024, sliding_window_pattern=6,
        query_pre_attn_scalar=256, hidden_activation="gelu_pytorch_tanh", model_type="gemma3_text",
    ),
    "Qwen2.5 7B": decoder("Qwen2ForCausalLM", 3584, 28, 28, 4, 128, 18944, 152064),
    "Llama 2 7B": decoder("LlamaForCausalLM", 4096, 32, 32, 32, 128, 11008, 32000),
}  # fmt: skip


def measure(name: str, bytes_per_s: float) -> None:
    """One model; a line of JSON for each number of rows."""
    import scaling
    from charonia.config import EngineConfig
    from charonia.entrypoints.bench.steps import measure_rows
    from charonia.model_config import ModelConfig
    from charonia.serving.engine_builder import build_engine
    from charonia.serving.input_processor import InputProcessor

    scaling.BYTES_PER_S = bytes_per_s
    model = MODELS[name]
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(model))
        config = EngineConfig(
            model=directory,
            load_format="dummy",
            max_model_len=8192,
            max_num_seqs=256,
            skip_tokenizer_init=True,
        )
        model_config = ModelConfig.from_dir(directory)
        core, _ = build_engine(config, model_config)
        inputs = InputProcessor(config, model_config, None)
        for rows, context in ROWS:
            options = argparse.Namespace(context=context, steps=STEPS)
            cost = measure_rows(core, inputs, rows, options, vocab_size=30_000)
            floor = scaling.floor_ms(model, rows, context + STEPS / 2 + 8)
            print(
                json.dumps(
                    {"model": name, "rows": rows, "context": context, "ms": cost.all, "floor_ms": floor}
                ),
                flush=True,
            )
        core.shutdown()


def main() -> None:
    """Measure all, and print a table of milliseconds a step and shares of the floor."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--bytes-per-s", type=float, default=4.3e12, help="of a device copy (default: an H200's)"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one, options.bytes_per_s)
        return
    print(f"{'ms a step (of floor)':<16}" + "".join(f"{f'{rows}x{context}':>13}" for rows, context in ROWS))
    results = []
    for name in options.models:
        command = [sys.executable, __file__, "--one", name, "--bytes-per-s", str(options.bytes_per_s)]
        run = subprocess.run(command, capture_output=True, text=True)
        rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        results += rows
        cells = [f"{row['ms']:.2f} ({row['floor_ms'] / row['ms']:.0%})" for row in rows]
        print(f"{name:<20}" + "".join(f"{cell:>13}" for cell in cells), flush=True)
        if run.returncode:
            print(run.stderr[-2000:], flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
