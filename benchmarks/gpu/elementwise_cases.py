"""What `elementwise.py` times: the ops, their shapes in real models, and the launch parameters to try."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from charonia_kernels.gpu._launch import INTERPRETED, traits
from charonia_kernels.gpu.activation import activation_config, gelu_tanh_mul, silu_mul
from charonia_kernels.gpu.embedding import embedding, gather_last_rows, row_copy_config
from charonia_kernels.gpu.norm import add_rms_norm, norm_config, rms_norm
from charonia_kernels.gpu.rope import qk_norm_rope_write, rope_config
from charonia_kernels.gpu.rows import append_tokens, apply_writes, prepare_step, write_config
from charonia_kernels.reference.rows import prepare_step as prepare_step_oracle

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
TRAITS = traits(DEVICE)
BLOCK_SIZE = 64
EPS = 1e-6
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Model:
    """Shapes of a model."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool
    vocab: int
    cache_blocks: int = 2048


MODELS = (
    Model("llama8b", 4096, 14336, 32, 8, 128, False, 128256),
    Model("qwen06b", 1024, 3072, 16, 8, 128, True, 151936),
)
TINY = (Model("tiny", 96, 160, 4, 2, 64, True, 50, 8),)


@dataclass(frozen=True)
class Flag:
    """Launch parameters of the kernels that have no others."""

    use_pdl: bool


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    bytes: least traffic of a launch. configs: default first. make(sets): a function that launches on buffer set i.
    """

    op: str
    model: str
    tokens: int
    bytes: int
    configs: tuple[Any, ...]
    make: Callable[[int], Callable[[int, Any], object]]


def normal(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Random numbers on the device."""
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def distinct(*configs: Any) -> tuple[Any, ...]:
    """Without repetitions, in order."""
    return tuple(dict.fromkeys(configs))


def norm_cases(model: Model, tokens: int) -> Iterator[Case]:
    """Both norms."""
    default = norm_config(model.hidden, TRAITS)
    configs = distinct(default, *(replace(default, num_warps=warps) for warps in (2, 4, 8, 16)))
    size = tokens * model.hidden * 2

    def make(with_residual: bool, sets: int) -> Callable[[int, Any], object]:
        x = [normal(tokens, model.hidden) for _ in range(sets)]
        residual = [normal(tokens, model.hidden) for _ in range(sets if with_residual else 0)]
        weight = normal(model.hidden)
        if with_residual:
            return lambda i, config: add_rms_norm(x[i], residual[i], weight, EPS, config=config)
        return lambda i, config: rms_norm(x[i], weight, EPS, config=config)

    yield Case("rms_norm", model.name, tokens, 2 * size, configs, lambda sets: make(False, sets))
    yield Case("add_rms_norm", model.name, tokens, 4 * size, configs, lambda sets: make(True, sets))


def activation_cases(model: Model, tokens: int) -> Iterator[Case]:
    """SiLU over the sweep, GELU with the default parameters."""
    default = activation_config(tokens, model.intermediate, TRAITS)
    others = ((512, 2), (512, 4), (1024, 4), (2048, 4), (2048, 8), (4096, 8))
    configs = distinct(default, *(replace(default, block=b, num_warps=w) for b, w in others))

    def make(gelu: bool, sets: int) -> Callable[[int, Any], object]:
        x = [normal(tokens, 2 * model.intermediate) for _ in range(sets)]
        op = gelu_tanh_mul if gelu else silu_mul
        return lambda i, config: op(x[i], config=config)

    size = 3 * tokens * model.intermediate * 2
    yield Case("silu_mul", model.name, tokens, size, configs, lambda sets: make(False, sets))
    yield Case("gelu_tanh_mul", model.name, tokens, size, configs[:1], lambda sets: make(True, sets))


def rope_inputs(model: Model, tokens: int, cache_dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of `qk_norm_rope_write`, eps included; slots outside the null block while there are enough."""
    shape = (model.cache_blocks, model.kv_heads, BLOCK_SIZE, model.head_dim)
    slots = torch.randperm((model.cache_blocks - 1) * BLOCK_SIZE, device=DEVICE)[:tokens] + BLOCK_SIZE
    angles = torch.rand(8192, model.head_dim // 2, device=DEVICE) * 6.3
    norms = [normal(model.head_dim) if model.qk_norm else None for _ in range(2)]
    return (
        normal(tokens, (model.heads + 2 * model.kv_heads) * model.head_dim),
        torch.randint(0, 8192, (tokens,), device=DEVICE, dtype=torch.int32),
        slots.to(torch.int32),
        torch.cat([angles.cos(), angles.sin()], dim=-1),
        torch.zeros(shape, dtype=cache_dtype, device=DEVICE),
        torch.zeros(shape, dtype=cache_dtype, device=DEVICE),
        model.heads,
        model.kv_heads,
        model.head_dim,
        *norms,
        EPS,
    )


def rope_cases(model: Model, tokens: int) -> Iterator[Case]:
    """Norm where the model has one, rotation, write to a bf16 cache."""
    default = rope_config(model.heads, model.kv_heads, model.head_dim, TRAITS)
    others = ((2, 1), (4, 2), (4, 4), (8, 2), (8, 4), (16, 4), (16, 8))
    configs = distinct(default, *(replace(default, heads=h, num_warps=w) for h, w in others))

    def make(sets: int) -> Callable[[int, Any], object]:
        _, positions, slots, *rest = rope_inputs(model, tokens, BF16)
        width = (model.heads + 2 * model.kv_heads) * model.head_dim
        qkv = [normal(tokens, width) for _ in range(sets)]
        order = [torch.randperm(tokens, device=DEVICE) for _ in range(sets)]
        index = [(positions[o], slots[o]) for o in order]
        return lambda i, config: qk_norm_rope_write(qkv[i], *index[i], *rest, config=config)

    size = 2 * tokens * (model.heads + 2 * model.kv_heads) * model.head_dim * 2 + tokens * 4 * model.head_dim
    yield Case("qk_norm_rope_write", model.name, tokens, size, configs, make)


def lookup_cases(model: Model, tokens: int) -> Iterator[Case]:
    """Embedding of random ids, and the last rows of at most 256 entries."""
    default = row_copy_config(model.hidden, TRAITS)
    others = ((512, 2), (1024, 2), (1024, 4), (2048, 8))
    configs = distinct(default, *(replace(default, block=b, num_warps=w) for b, w in others))
    entries = min(tokens, 256)

    def make_embedding(sets: int) -> Callable[[int, Any], object]:
        weight = normal(model.vocab, model.hidden)
        ids = [
            torch.randint(0, model.vocab, (tokens,), device=DEVICE, dtype=torch.int32) for _ in range(sets)
        ]
        return lambda i, config: embedding(ids[i], weight, config=config)

    def make_last(sets: int) -> Callable[[int, Any], object]:
        x = [normal(tokens, model.hidden) for _ in range(sets)]
        starts = torch.linspace(0, tokens, entries + 1, device=DEVICE).to(torch.int32)
        return lambda i, config: gather_last_rows(x[i], starts, config=config)

    row = model.hidden * 2
    yield Case("embedding", model.name, tokens, 2 * tokens * row, configs, make_embedding)
    yield Case("gather_last_rows", model.name, tokens, 2 * entries * row, configs, make_last)


@dataclass(frozen=True)
class Step:
    """Rows and a step of theirs, as `prepare_step` takes them."""

    rows: torch.Tensor
    starts: torch.Tensor
    num_computed: torch.Tensor
    token_ids: torch.Tensor
    block_table: torch.Tensor
    outs: tuple[torch.Tensor, ...]
    seq_lens: torch.Tensor

    def prepare(self, op: Callable[..., None], **options: Any) -> None:
        """Run `op` on these."""
        state = (self.num_computed, self.token_ids, self.block_table)
        op(self.rows, self.starts, *state, BLOCK_SIZE, *self.outs, self.seq_lens, **options)


def make_step(tokens: int, max_tokens: int, num_rows: int) -> Step:
    """All tokens, over at most num_rows entries, in an arena of random numbers."""
    entries, blocks = min(tokens, num_rows), max_tokens // BLOCK_SIZE
    sizes = [num_rows, num_rows * max_tokens, num_rows * blocks, tokens, tokens, tokens, entries]
    arena = torch.randint(0, 30_000, (sum(sizes),), device=DEVICE, dtype=torch.int32)
    num_computed, token_ids, block_table, *outs, seq_lens = arena.split(sizes)
    longest = -(-tokens // entries)
    num_computed.remainder_(max_tokens - longest - 1)
    return Step(
        torch.randperm(num_rows, device=DEVICE)[:entries].to(torch.int32),
        (torch.arange(entries + 1, device=DEVICE) * tokens // entries).to(torch.int32),
        num_computed,
        token_ids.view(num_rows, -1),
        block_table.view(num_rows, -1),
        tuple(outs),
        seq_lens,
    )


def make_writes(words: int, segments: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An arena of zeros, and staged segments of about equal length that go to places with gaps."""
    length = max(words // segments, 1)
    record = torch.arange(segments, dtype=torch.int32, device=DEVICE)
    dest, source = record * (length + 5) + 1, 3 * segments + record * length
    records = torch.stack([dest, source, torch.full_like(record, length)], dim=1).flatten()
    payload = torch.arange(1, segments * length + 1, dtype=torch.int32, device=DEVICE)
    arena = torch.zeros(segments * (length + 5) + 2, dtype=torch.int32, device=DEVICE)
    return arena, torch.cat([records, payload])


def row_cases(tokens: int) -> Iterator[Case]:
    """The row kernels; `apply_writes` writes as many words as there are tokens, to at most 64 places."""
    pdl = TRAITS.has_pdl
    num_rows, max_tokens = (8, 256) if INTERPRETED else (256, 16384)

    def make_prepare(sets: int) -> Callable[[int, Any], object]:
        steps = [make_step(tokens, max_tokens, num_rows) for _ in range(sets)]
        return lambda i, config: steps[i].prepare(prepare_step, use_pdl=config.use_pdl)

    def make_append(sets: int) -> Callable[[int, Any], object]:
        step = make_step(tokens, max_tokens, num_rows)
        step.prepare(prepare_step_oracle)
        samples = torch.ones_like(step.rows)

        def run(i: int, config: Any) -> None:
            del i
            where = (step.rows, step.starts, step.seq_lens, samples, step.rows)
            append_tokens(*where, step.num_computed, step.token_ids, use_pdl=config.use_pdl)

        return run

    segments = min(tokens, 64)
    default = write_config(segments, tokens, TRAITS)
    configs = distinct(default, *(replace(default, splits=splits) for splits in (1, 4, 16)))

    def make_apply(sets: int) -> Callable[[int, Any], object]:
        del sets
        arena, staged = make_writes(tokens, segments)
        return lambda i, config: apply_writes(arena, staged, segments, config=config)

    yield Case("prepare_step", "any", tokens, 4 * 6 * tokens, (Flag(pdl),), make_prepare)
    yield Case("append_tokens", "any", tokens, 4 * 7 * min(tokens, num_rows), (Flag(pdl),), make_append)
    yield Case("apply_writes", "any", tokens, 8 * tokens, configs, make_apply)


def all_cases(models: tuple[Model, ...], tokens: int) -> Iterator[Case]:
    """Every op at this many tokens."""
    for model in models:
        for cases in (norm_cases, activation_cases, rope_cases, lookup_cases):
            yield from cases(model, tokens)
    yield from row_cases(tokens)
