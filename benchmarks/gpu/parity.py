"""The engine's tokens on this GPU, whatever the way they are computed: fp32, greedy, against transformers.

    PYTHONPATH=engine:kernels:client:tests python benchmarks/gpu/parity.py [--model DIR | --random gemma3]

With a checkpoint, on the prompts of the test suite; without one, a random Qwen3 or Gemma 3. Runs graphs on and off,
lookahead on and off, chunked and whole, prefix sharing on and off, two block sizes; then log-probabilities in 16 bits
and with a cache of 8 bits against transformers' in fp32, with transformers' own in bf16 for comparison; then all
sampling features at once in bf16, which must merely run. Prints a line for each, and ends with an error unless all fp32
runs give transformers' tokens and bf16 is as close to fp32 as transformers' is.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from charonia import LLM, SamplingParams

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 512, "intermediate_size": 1024,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 4096,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "eos_token_id": 2, "torch_dtype": "float32", "attention_bias": False, "hidden_act": "silu",
}  # fmt: skip
GEMMA = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 512, "intermediate_size": 1024,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 4096,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    "sliding_window": 128, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256, "tie_word_embeddings": False,
    "eos_token_id": 2, "torch_dtype": "float32", "attention_bias": False, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
RANDOM = {"qwen3": CONFIG, "gemma3": GEMMA}
NUM_TOKENS = 48
NUM_SHARING = 8
VARIANTS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "no lookahead": {"async_scheduling": False},
    "chunked": {"max_num_batched_tokens": 53, "max_num_seqs": 32},
    "no prefix caching": {"enable_prefix_caching": False},
    "blocks of 16": {"block_size": 16},
    "tight cache": {"num_kv_blocks_override": 40},
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "fp16": {"dtype": "float16"},
    "bf16, fp8 cache": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
}


def prompts() -> list[list[int]]:
    """Lengths 1 to 700, and `NUM_SHARING` with a common prefix of 384."""
    lengths = [1, 2, 5, 17, 63, 64, 65, 130, 300, 700]
    found = [[11 + (7 * row + i * i) % 4000 for i in range(length)] for row, length in enumerate(lengths)]
    head = [13 + (i * 31) % 4001 for i in range(384)]
    return found + [[*head, 20 + row, 30 + row, 40] for row in range(NUM_SHARING)]


def suite_prompts(directory: str) -> list[list[int]]:
    """The prompts of the test suite, in the checkpoint's tokens."""
    from charonia.text import Tokenizer
    from support.prompts import parity_prompts

    return list(parity_prompts(Tokenizer.from_dir(Path(directory))).values())


def reference_logprobs(directory: str, inputs: list[list[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Of each prompt, the log-probabilities of its tokens but the first: by transformers, the products in `dtype`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").cuda()
    found = []
    with torch.inference_mode():
        for prompt in inputs:
            ids = torch.tensor([prompt], device="cuda")
            scores = model(ids).logits[0, :-1].float().log_softmax(-1)
            found.append(scores.gather(1, ids[0, 1:, None])[:, 0].cpu())
    del model
    torch.cuda.empty_cache()
    return found


def prompt_scores(llm: LLM, inputs: list[list[int]]) -> list[torch.Tensor]:
    """The engine's, as `reference_logprobs`."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = []
    for output in llm.generate(inputs, params, use_tqdm=False):
        assert output.prompt_logprobs is not None
        pairs = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        found.append(torch.tensor([entry[token].logprob for token, entry in pairs if entry is not None]))
    return found


def compare_precision(directory: str, inputs: list[list[int]], settings: dict[str, Any]) -> bool:
    """Print how far log-probabilities are from fp32's; whether bf16 is about as close as transformers' bf16."""
    exact = torch.cat(reference_logprobs(directory, inputs, torch.float32))

    def error_of(name: str, found: list[torch.Tensor]) -> float:
        difference = (torch.cat(found) - exact).abs()
        mean = float(difference.mean())
        print(
            f"{name:20} log-probabilities off by {mean:.5f} on average, {float(difference.max()):.4f} at most"
        )
        return mean

    theirs = error_of("transformers bf16", reference_logprobs(directory, inputs, torch.bfloat16))
    errors = {}
    for name, changes in PRECISIONS.items():
        with LLM(directory, **{**settings, **changes}) as llm:
            errors[name] = error_of(name, prompt_scores(llm, inputs))
    return errors["fp32"] < 1e-3 and errors["bf16"] < 1.25 * theirs


def reference_tokens(directory: str, inputs: list[list[int]]) -> list[list[int]]:
    """Transformers' own greedy continuations, one prompt at a time, in fp32 on this GPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).cuda()
    found = []
    for prompt in inputs:
        ids = torch.tensor([prompt], device="cuda")
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_TOKENS,
                             min_new_tokens=NUM_TOKENS, eos_token_id=None, pad_token_id=0)  # fmt: skip
        found.append(out[0, len(prompt) :].tolist())
    del model
    torch.cuda.empty_cache()
    return found


def random_model(directory: str, config: dict[str, Any]) -> None:
    """A random checkpoint, written by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    Path(directory, "config.json").write_text(json.dumps({**config, "initializer_range": 0.1}))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).save_pretrained(directory)


def main() -> int:
    """Run the variants."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--random", choices=RANDOM, default="qwen3")
    args = parser.parse_args()
    compiled: list[str] = []
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.model or temporary
        if args.model is None:
            random_model(temporary, RANDOM[args.random])
        inputs = prompts() if args.model is None else suite_prompts(directory)
        expected = reference_tokens(directory, inputs)
        greedy = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)
        settings = {
            "skip_tokenizer_init": True,
            "max_model_len": 1024 if args.model is None else 2048 + NUM_TOKENS,
            "gpu_memory_utilization": 0.5,
            "max_num_seqs": 64,
        }
        for name, changes in VARIANTS.items():
            with LLM(directory, dtype="float32", **{**settings, **changes}) as llm:
                compiled.clear()
                triton.knobs.runtime.jit_post_compile_hook = lambda **given: compiled.append(given["fn"].name)
                outputs = llm.generate(inputs, greedy, use_tqdm=False)
                # By themselves, those of the random model share a prefix that is read once for all.
                outputs += llm.generate(inputs[-NUM_SHARING:], greedy, use_tqdm=False)
                triton.knobs.runtime.jit_post_compile_hook = None
            wanted = expected + expected[-NUM_SHARING:]
            same = [out.outputs[0].token_ids == tokens for out, tokens in zip(outputs, wanted, strict=True)]
            wrong += len(same) - sum(same)
            print(
                f"{name:20} {sum(same)} of {len(same)} as transformers; compiled while serving: {compiled}",
                flush=True,
            )
        close = compare_precision(directory, inputs, settings)
        everything = SamplingParams(
            temperature=0.8, top_p=0.9, top_k=50, min_p=0.01, seed=1, max_tokens=NUM_TOKENS, ignore_eos=True,
            detokenize=False, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1, logprobs=3,
            prompt_logprobs=2, logit_bias={7: 1.0}, min_tokens=4, stop_token_ids=[9],
            allowed_token_ids=list(range(4000)),
        )  # fmt: skip
        plain = SamplingParams(
            temperature=1.0, seed=3, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False
        )
        with LLM(directory, dtype="bfloat16", **settings) as llm:
            alone = llm.generate(inputs[:3], [everything] * 3, use_tqdm=False)
            mixed = llm.generate(inputs, [everything] * 3 + [plain] * (len(inputs) - 3), use_tqdm=False)
            first = [out.outputs[0].token_ids for out in alone]
            again = [out.outputs[0].token_ids for out in mixed[:3]]
            agreeing = sum(a[:4] == b[:4] for a, b in zip(first, again, strict=True))
            entry = mixed[0].outputs[0].logprobs
            print(f"all features: {len(mixed)} outputs, {agreeing} of 3 begin alike alone and mixed, "
                  f"{len(entry or [])} logprobs, prompt logprobs {len(mixed[2].prompt_logprobs or [])}")  # fmt: skip
            free, total = torch.cuda.mem_get_info()
            print(f"memory in use {(total - free) / total:.3f} at setting 0.5")
    return 1 if wrong or not close else 0


if __name__ == "__main__":
    raise SystemExit(main())
