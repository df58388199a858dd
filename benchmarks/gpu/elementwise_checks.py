"""What `elementwise.py` checks before it times anything: the kernels at real sizes, against the oracles."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import support.interpreter  # noqa: F401
import torch
from charonia_kernels import reference
from charonia_kernels.gpu._launch import INTERPRETED
from charonia_kernels.gpu.activation import gelu_tanh_mul, silu_mul
from charonia_kernels.gpu.embedding import embedding, gather_last_rows, row_copy_config
from charonia_kernels.gpu.norm import add_rms_norm, norm_config, rms_norm
from charonia_kernels.gpu.rope import qk_norm_rope_write
from charonia_kernels.gpu.rows import append_tokens, apply_writes, prepare_step
from charonia_kernels.reference import rows as oracle
from elementwise_cases import (
    BF16,
    BLOCK_SIZE,
    DEVICE,
    EPS,
    TRAITS,
    Model,
    make_step,
    make_writes,
    normal,
    rope_inputs,
)  # fmt: skip
from support.kernel_checks import assert_close


def capture(graph: Any, run: Callable[[], object]) -> None:
    """Record `run`, without the garbage collection that torch.cuda.graph does each time."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            run()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)


def check_dense(model: Model, tokens: int) -> None:
    """Norms and activations against fp64."""
    x, residual, weight = normal(tokens, model.hidden), normal(tokens, model.hidden), normal(model.hidden)
    wide = reference.rms_norm(x.double(), weight.double(), EPS)
    assert_close(rms_norm(x, weight, EPS), wide, depth=16)
    total = x.double() + residual.double()
    result = add_rms_norm(x, residual, weight, EPS)
    assert_close(residual, total)
    assert_close(result, reference.rms_norm(residual.double(), weight.double(), EPS), depth=16)
    x = normal(tokens, 2 * model.intermediate) * 3
    assert_close(silu_mul(x), reference.silu_mul(x.double()), depth=16, scale=4.0)
    assert_close(gelu_tanh_mul(x), reference.gelu_tanh_mul(x.double()), depth=16, scale=4.0)


def check_rope(model: Model, tokens: int) -> None:
    """Query and both caches against the oracle, in bf16 against fp64, in fp8 against fp32 rounded to fp8."""
    inputs = rope_inputs(model, tokens, BF16)
    slots = inputs[2].long()
    places = (slots // BLOCK_SIZE, slice(None), slots % BLOCK_SIZE)
    q = qk_norm_rope_write(*inputs)
    wide = [
        t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in rope_inputs(model, 0, BF16)
    ]
    wide[0], wide[1:4] = inputs[0].double(), inputs[1:4]
    wide[9:11] = [None if weight is None else weight.double() for weight in inputs[9:11]]
    assert_close(q, reference.qk_norm_rope_write(*wide), depth=model.head_dim)
    assert_close(inputs[4][places], wide[4][places], depth=model.head_dim)
    assert torch.equal(inputs[5].double(), wide[5]), "value cache"
    written = [(cache != 0).any(dim=-1) for cache in (inputs[4], wide[4])]
    assert torch.equal(*written), "other slots of the key cache"
    scales = [torch.tensor([0.37], device=DEVICE), torch.tensor([1.9], device=DEVICE)]
    fp8 = [torch.zeros_like(inputs[4], dtype=torch.float8_e4m3fn) for _ in range(2)]
    qk_norm_rope_write(*inputs[:4], *fp8, *inputs[6:], *scales)
    expected = [
        (wide[4] / scales[0].double()).clamp(-448, 448),
        (wide[5] / scales[1].double()).clamp(-448, 448),
    ]
    for stored, exact in zip(fp8, expected, strict=True):
        allowed = (exact.abs() * 2**-4).clamp(min=2**-10) * 1.001 + 1e-5
        assert bool(((stored.double() - exact).abs() <= allowed).all()), "fp8 cache"


def check_lookups(model: Model, tokens: int) -> None:
    """Exact copies."""
    weight = normal(model.vocab, model.hidden)
    ids = torch.randint(0, model.vocab, (tokens,), device=DEVICE, dtype=torch.int32)
    assert torch.equal(embedding(ids, weight), weight[ids.long()]), "embedding"
    x, starts = normal(tokens, model.hidden), torch.tensor([0, tokens // 2, tokens, tokens], device=DEVICE)
    expected = x[[max(tokens // 2 - 1, 0), tokens - 1, tokens - 1]]
    assert torch.equal(gather_last_rows(x, starts.to(torch.int32)), expected), "gather_last_rows"


def check_rows(tokens: int) -> None:
    """Row kernels against the oracles."""
    num_rows, max_tokens = (8, 256) if INTERPRETED else (256, 16384)
    step = make_step(tokens, max_tokens, num_rows)
    step.prepare(oracle.prepare_step)
    expected = [t.clone() for t in (*step.outs, step.seq_lens)]
    for tensor in (*step.outs, step.seq_lens):
        tensor.fill_(-1)
    step.prepare(prepare_step)
    for i, (tensor, other) in enumerate(zip((*step.outs, step.seq_lens), expected, strict=True)):
        assert torch.equal(tensor, other), f"prepare_step, output {i}"
    where = (step.rows, step.starts, step.seq_lens, torch.ones_like(step.rows), step.rows + 40_000)
    results = []
    for op in (oracle.append_tokens, append_tokens):
        state = step.num_computed.clone(), step.token_ids.clone()
        op(*where, *state)
        results.append(state)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "append_tokens"
    for segments in (1, min(tokens, 64)):
        arena, staged = make_writes(tokens, segments)
        other = arena.clone()
        apply_writes(arena, staged, segments)
        oracle.apply_writes(other, staged, segments)
        assert torch.equal(arena, other), "apply_writes"


def check_dependent_launches(model: Model, tokens: int) -> None:
    """A chain in which every kernel reads what the one before wrote: with PDL, in a graph, as without, eagerly."""
    start, total, weight = normal(tokens, model.hidden), normal(tokens, model.hidden), normal(model.hidden)
    starts = torch.arange(tokens + 1, device=DEVICE, dtype=torch.int32)

    def chain(x: torch.Tensor, residual: torch.Tensor, use_pdl: bool) -> torch.Tensor:
        norms = replace(norm_config(model.hidden, TRAITS), use_pdl=use_pdl)
        copies = replace(row_copy_config(model.hidden, TRAITS), use_pdl=use_pdl)
        for _ in range(20):
            x = add_rms_norm(x, residual, weight, EPS, config=norms)
            x = gather_last_rows(x, starts, config=copies)
            x = rms_norm(x, weight, EPS, config=norms)
        return x

    expected = chain(start, total.clone(), False)
    residual = total.clone()
    if INTERPRETED:
        actual = chain(start, residual, False)
    else:
        chain(start, residual, True)
        graph, results = torch.cuda.CUDAGraph(), []
        capture(graph, lambda: results.append(chain(start, residual, True)))
        for _ in range(5):
            residual.copy_(total)
            graph.replay()
            assert torch.equal(results[0], expected), "a chain of dependent launches"
        actual = results[0]
    assert torch.equal(actual, expected), "a chain of dependent launches"


def run_checks(models: tuple[Model, ...], counts: tuple[int, ...]) -> list[str]:
    """What failed."""
    failures = []
    for tokens in counts:
        checks = [(check, (model, tokens)) for model in models for check in (
            check_dense, check_rope, check_lookups, check_dependent_launches)]  # fmt: skip
        for check, args in [*checks, (check_rows, (tokens,))]:
            name = f"{check.__name__}({', '.join(str(getattr(arg, 'name', arg)) for arg in args)})"
            try:
                check(*args)
            except Exception as error:
                failures.append(f"{name}: {type(error).__name__}: {str(error)[:400]}")
                print(f"FAILED {failures[-1]}", flush=True)
    return failures
