"""A small run through every kernel of the serving path, for compute-sanitizer.

    python benchmarks/gpu/sanitize.py                                        # compiles
    compute-sanitizer --tool memcheck python benchmarks/gpu/sanitize.py
    compute-sanitizer --tool racecheck python benchmarks/gpu/sanitize.py

bf16, one layer, without graphs: chunked prompts beside decodes, a shared prefix, filters, penalties, rules, logprobs;
then the Hopper kernel for linear layers, which so small a model does not use.
"""

import itertools
import json
import tempfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from charonia import LLM, SamplingParams
from charonia_kernels.gpu._launch import traits
from charonia_kernels.gpu.linear_choice import has_hopper_kernel
from charonia_kernels.gpu.linear_config import hopper_config

linear_ops: Any = import_module("charonia_kernels.gpu.linear")

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 4096,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "eos_token_id": 2, "torch_dtype": "bfloat16", "attention_bias": False, "hidden_act": "silu",
}  # fmt: skip


def run_linear_layers() -> None:
    """The Hopper kernel at few and at many rows, with all that can be fused, the columns whole and divided."""
    device = torch.device("cuda")
    weight = torch.randn(512, 1024, device=device, dtype=torch.bfloat16)
    norm_weight = torch.ones(1024, device=device, dtype=torch.bfloat16)
    for rows, split_k, x_major in itertools.product((8, 64), (1, 2), (False, True)):
        x = torch.randn(rows, 1024, device=device, dtype=torch.bfloat16)
        for fuse_norm in (False, True):
            config = hopper_config(rows, 1024, 64, 128, split_k, fuse_norm=fuse_norm, x_major=x_major)
            if config is None:
                continue
            linear_ops.norm_linear_silu_mul_with(config, x, norm_weight, 1e-6, weight)
            linear_ops.norm_linear_with(config, x, norm_weight, 1e-6, weight)
            residual = x.new_zeros(rows, 512)
            linear_ops.linear_add_with(replace(config, fuse_norm=False), x, weight, residual)
    torch.cuda.synchronize()


def main() -> None:
    """Run it."""
    head = [13 + (i * 31) % 4001 for i in range(320)]
    prompts = [[*head, 20 + row, 30 + row] for row in range(6)] + [[5, 6, 7], list(range(10, 190))]
    plain = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, detokenize=False)
    rich = SamplingParams(
        temperature=0.8, top_p=0.9, top_k=50, min_p=0.01, seed=1, max_tokens=6, ignore_eos=True, detokenize=False,
        repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1, logprobs=3, logit_bias={7: 1.0},
        min_tokens=4, stop_token_ids=[9], allowed_token_ids=list(range(4000)),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(CONFIG))
        with LLM(
            directory, skip_tokenizer_init=True, load_format="dummy", max_model_len=512, max_num_seqs=16,
            max_num_batched_tokens=256, enforce_eager=True, num_kv_blocks_override=200,
        ) as llm:  # fmt: skip
            for params in (plain, rich):
                outputs = llm.generate(prompts, params, use_tqdm=False)
                assert all(len(output.outputs[0].token_ids) == 6 for output in outputs)
    if has_hopper_kernel(traits(torch.device("cuda"))):
        run_linear_layers()
    print("done")


if __name__ == "__main__":
    main()
