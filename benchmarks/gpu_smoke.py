"""First check of a GPU machine: the engine runs there, gives the CPU's tokens, and honours its memory setting.

    python benchmarks/gpu_smoke.py --tokenizer DIR      # DIR: any tokenizer; the weights are random

Prints one JSON object. Kernels of our own come later; until then the GPU runs the PyTorch references, so the times here
say nothing about speed.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from charonia import LLM, SamplingParams

SMALL = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip
LARGE = {
    **SMALL, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def tokens(llm: LLM, rows: int, length: int) -> list[list[int]]:
    """Greedy tokens of `rows` prompts of growing length."""
    prompts = [[11 + (7 * row + i * i) % 4000 for i in range(20 + 37 * row)] for row in range(rows)]
    params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


def write_model(folder: Path, config: dict[str, Any]) -> str:
    """A checkpoint directory for dummy weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def main() -> None:
    """Run the checks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True)
    args = parser.parse_args()
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as temporary:
        small = write_model(Path(temporary) / "small", SMALL)
        large = write_model(Path(temporary) / "large", LARGE)
        settings: dict[str, Any] = {"tokenizer": args.tokenizer, "load_format": "dummy"}
        torch.backends.cuda.matmul.allow_tf32 = False
        with LLM(small, device="cuda", dtype="float32", num_kv_blocks_override=400, **settings) as llm:
            on_gpu = tokens(llm, 8, 32)
        with LLM(small, device="cuda", dtype="float32", num_kv_blocks_override=400, max_num_seqs=16,
                 max_num_batched_tokens=37, async_scheduling=False, **settings) as llm:  # fmt: skip
            result["gpu_chunked_equals_whole"] = tokens(llm, 8, 32) == on_gpu
        start = time.perf_counter()
        with LLM(large, device="cuda", gpu_memory_utilization=0.8, max_model_len=8192, **settings) as llm:
            result["start_s"] = time.perf_counter() - start
            tokens(llm, 32, 64)
            free, total = torch.cuda.mem_get_info()
            result["memory_used_share"] = (total - free) / total
            result["stats"] = repr(llm.stats())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
