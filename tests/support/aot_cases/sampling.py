"""Specialisations of the sampling kernels that the launchers ask for."""

from collections.abc import Iterator

from charonia_kernels.gpu._launch import H100
from charonia_kernels.gpu.logit_rules import logit_rules_kernel, rules_config
from charonia_kernels.gpu.logprobs import logprobs_chunk_kernel, logprobs_combine_kernel, logprobs_config
from charonia_kernels.gpu.penalties import penalties_kernel, penalty_config
from charonia_kernels.gpu.sampling import sample_kernel
from charonia_kernels.gpu.sampling_filters import filter_chunk_kernel, filter_config, filter_search_kernel
from support.aot import AotCase


def cases() -> Iterator[AotCase]:
    for dtype in ("bf16", "fp32"):
        yield from sampling(dtype)
        for vocab in (128256, 151936):
            yield from filters(dtype, vocab)
        yield from log_probabilities(dtype)
    yield from changes()


def sampling(dtype: str) -> Iterator[AotCase]:
    pointers = {"logits": f"*{dtype}", **dict.fromkeys(("rows", "seq_lens", "row_params"), "*i32")}
    rest = {
        "best": "*i64", "arrived": "*i32", "tokens": "*i32", "outcomes": "*i32",
        "stride": "i32", "vocab": "i32", "tiles": "i32",
    }  # fmt: skip
    for name, thresholds in (("plain", None), ("filtered", "*fp32")):
        signature = {**pointers, **({"thresholds": thresholds} if thresholds else {}), **rest}
        constexprs = {"USE_PDL": False, **({} if thresholds else {"thresholds": None})}
        yield AotCase(
            f"sample-{name}-{dtype}", sample_kernel, signature, constexprs, aligned=("stride", "vocab")
        )
    yield AotCase(
        f"sample-odd-{dtype}", sample_kernel, {**pointers, **rest}, {"USE_PDL": False, "thresholds": None}
    )
    yield AotCase(
        f"sample-pdl-{dtype}", sample_kernel, {**pointers, **rest}, {"USE_PDL": True, "thresholds": None},
        aligned=("stride", "vocab"), archs=(90, 100), options={"launch_pdl": True},
    )  # fmt: skip


def filters(dtype: str, vocab: int) -> Iterator[AotCase]:
    config = filter_config(vocab, H100)
    chunks = -(-vocab // config.chunk)
    pointers = {
        "logits": f"*{dtype}", "rows": "*i32", "row_params": "*i32", "candidates": "*fp32", "stats": "*fp32",
    }  # fmt: skip
    scalars = {"stride": "i32", "vocab": "i32"}
    constexprs = {"KEEP": config.keep, "USE_PDL": False}
    yield AotCase(
        f"filter-chunk-{dtype}-{vocab}", filter_chunk_kernel, {**pointers, **scalars},
        {"CHUNK": config.chunk, **constexprs}, num_warps=config.chunk_warps, aligned=("stride", "vocab"),
        options={"maxnreg": config.chunk_registers},
    )  # fmt: skip
    yield AotCase(
        f"filter-search-{dtype}-{vocab}", filter_search_kernel,
        {**pointers, "thresholds": "*fp32", **scalars, "chunks": "i32"},
        {"CHUNKS": 1 << (chunks - 1).bit_length(), "BLOCK": 512 * config.search_warps, **constexprs},
        num_warps=config.search_warps, aligned=("stride", "vocab") + (("chunks",) if chunks % 16 == 0 else ()),
    )  # fmt: skip


def changes() -> Iterator[AotCase]:
    """Penalties and rules; both work on fp32 logits."""
    rows = dict.fromkeys(("rows", "seq_lens", "token_ids", "row_params"), "*i32")
    penalties = penalty_config(64, 64, H100)
    yield AotCase(
        "penalties", penalties_kernel,
        {"logits": "*fp32", **rows, "counts": "*i32",
         **dict.fromkeys(("logits_stride", "token_stride", "counts_stride", "vocab", "batch"), "i32")},
        {"BLOCK": penalties.block, "USE_PDL": False}, num_warps=penalties.num_warps,
        aligned=("logits_stride", "token_stride", "counts_stride", "vocab"),
    )  # fmt: skip
    rules = rules_config(64, 128256, H100)
    yield AotCase(
        "logit-rules", logit_rules_kernel,
        {"logits": "*fp32", **rows, "records": "*i32", "pool": "*i32",
         **dict.fromkeys(("logits_stride", "token_stride", "vocab"), "i32")},
        {"BLOCK": rules.block, "USE_PDL": False}, num_warps=rules.num_warps,
        aligned=("logits_stride", "token_stride", "vocab"),
    )  # fmt: skip


def log_probabilities(dtype: str) -> Iterator[AotCase]:
    config = logprobs_config(H100)
    yield AotCase(
        f"logprobs-chunk-{dtype}", logprobs_chunk_kernel,
        {"logits": f"*{dtype}", "tokens": "*i32", "stats": "*fp32", "stride": "i32", "vocab": "i32"},
        {"CHUNK": config.chunk, "USE_PDL": False}, num_warps=config.num_warps, aligned=("stride", "vocab"),
    )  # fmt: skip
    yield AotCase(
        f"logprobs-combine-{dtype}", logprobs_combine_kernel,
        {"logits": f"*{dtype}", "tokens": "*i64", "stats": "*fp32", "own": "*fp32", "rank": "*i32",
         "normaliser": "*fp32", "stride": "i32", "chunks": "i32"},
        {"CHUNKS": 32, "USE_PDL": False}, num_warps=1, aligned=("stride", "chunks"),
    )  # fmt: skip
