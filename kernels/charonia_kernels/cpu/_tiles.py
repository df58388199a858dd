"""Register-tiled products and a transposition, the arithmetic cores of the CPU kernels.

They are emitted as explicit 8-lane vector code rather than left to the loop vectoriser, for two reasons: the tile
stays in registers whatever the compiler's mood, and the order of the additions for one output is the same for every
tile shape. A row's result therefore does not depend on how many rows it is computed with.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from charonia_kernels.cpu._simd import (
    CACHE_LINE,
    F32,
    I64,
    LANES,
    VECTOR,
    fma,
    load_lanes,
    load_scalar,
    prefetch_line,
    shuffle,
    splat,
    store_scalar,
)


def _sum_each(builder: Any, vectors: list[Any]) -> list[Any]:
    """The sum of the lanes of each vector, as scalars.

    Eight vectors are folded together: each step adds lanes that are ``step`` apart and packs the sums of two vectors
    into one. Every vector is summed in the same order, whatever its place and whatever the others are.
    """
    sums: list[Any] = []
    for first in range(0, len(vectors), LANES):
        group = vectors[first : first + LANES]
        packed = [*group, *[ir.Constant(VECTOR, ir.Undefined)] * (LANES - len(group))]
        for step in (1, 2, 4):
            low = [i if i & step == 0 else LANES + i - step for i in range(LANES)]
            high = [i + step if i & step == 0 else LANES + i for i in range(LANES)]
            packed = [
                builder.fadd(shuffle(builder, a, b, low), shuffle(builder, a, b, high))
                for a, b in zip(packed[::2], packed[1::2], strict=True)
            ]
        sums += [builder.extract_element(packed[0], ir.IntType(32)(i)) for i in range(len(group))]
    return sums


def dot_tile(rows: int, columns: int, ahead: int = 0) -> Callable[..., None]:
    """A jit function ``(x, x_stride, w, w_stride, depth, bias, out, out_stride)``.

    ``out[r * out_stride + c] = bias[c] + sum_k x[r * x_stride + k] * w[c * w_stride + k]`` for r < rows, c < columns.
    x and bias point to fp32 (bias may be null), w and out to fp32 or bf16; strides are in elements. Unless ``ahead``
    is 0, what lies so many bytes behind w is prefetched at the rate at which w is read: hardware prefetchers do not
    follow several short rows at once to where the next ones begin.
    """

    @intrinsic
    def tile(
        typing_context: Any, x: Any, xs: Any, w: Any, ws: Any, depth: Any, bias: Any, out: Any, outs: Any
    ) -> Any:
        i64 = types.int64
        signature = types.void(x, i64, w, i64, i64, bias, out, i64)
        is_bf16 = w.dtype == types.uint16

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x_base, x_stride, w_base, w_stride, depth, bias, out_base, out_stride = args
            zero = ir.Constant(VECTOR, [0.0] * LANES)
            cells = [(r, c) for r in range(rows) for c in range(columns)]
            x_rows = [builder.gep(x_base, [builder.mul(x_stride, I64(r))]) for r in range(rows)]
            w_rows = [builder.gep(w_base, [builder.mul(w_stride, I64(c))]) for c in range(columns)]
            lanes = {cell: cgutils.alloca_once_value(builder, zero) for cell in cells}
            whole = builder.and_(depth, I64(-LANES))
            with cgutils.for_range_slice(builder, I64(0), whole, I64(LANES), I64) as (k, _):
                if ahead:
                    element = 2 if is_bf16 else 4
                    read = builder.mul(k, I64(columns * element))
                    for line in range(0, columns * LANES * element, CACHE_LINE):
                        prefetch_line(builder, w_base, builder.add(read, I64(ahead + line)))
                w_values = [load_lanes(builder, base, k, is_bf16) for base in w_rows]
                for r in range(rows):
                    x_value = load_lanes(builder, x_rows[r], k, False)
                    for c in range(columns):
                        accumulator = lanes[r, c]
                        builder.store(
                            fma(builder, x_value, w_values[c], builder.load(accumulator)), accumulator
                        )
            sums = {cell: cgutils.alloca_once(builder, F32) for cell in cells}
            totals = _sum_each(builder, [builder.load(lanes[cell]) for cell in cells])
            for cell, total in zip(cells, totals, strict=True):
                builder.store(total, sums[cell])
            with cgutils.for_range_slice(builder, whole, depth, I64(1), I64) as (k, _):
                w_scalars = [load_scalar(builder, base, k, is_bf16) for base in w_rows]
                for r in range(rows):
                    x_scalar = builder.load(builder.gep(x_rows[r], [k]))
                    for c in range(columns):
                        total = sums[r, c]
                        builder.store(fma(builder, x_scalar, w_scalars[c], builder.load(total)), total)
            with builder.if_then(cgutils.is_not_null(builder, bias)):
                for c in range(columns):
                    addend = builder.load(builder.gep(bias, [I64(c)]))
                    for r in range(rows):
                        builder.store(builder.fadd(builder.load(sums[r, c]), addend), sums[r, c])
            for r, c in cells:
                position = builder.add(builder.mul(out_stride, I64(r)), I64(c))
                store_scalar(builder, builder.load(sums[r, c]), builder.gep(out_base, [position]))
            return context.get_dummy_value()

        return signature, codegen

    return tile  # type: ignore[no-any-return]


def outer_tile(rows: int, vectors: int) -> Callable[..., None]:
    """A jit function ``(p, p_stride, v, v_stride, depth, acc, acc_stride)``.

    ``acc[r * acc_stride + i] += sum_j p[r * p_stride + j] * v[j * v_stride + i]`` for r < rows, i < 8 * vectors.
    p and acc point to fp32, v to fp32 or bf16; strides are in elements.
    """

    @intrinsic
    def tile(typing_context: Any, p: Any, ps: Any, v: Any, vs: Any, depth: Any, acc: Any, accs: Any) -> Any:
        i64 = types.int64
        signature = types.void(p, i64, v, i64, i64, acc, i64)
        is_bf16 = v.dtype == types.uint16

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            p_base, p_stride, v_base, v_stride, depth, acc_base, acc_stride = args
            p_rows = [builder.gep(p_base, [builder.mul(p_stride, I64(r))]) for r in range(rows)]
            acc_rows = [builder.gep(acc_base, [builder.mul(acc_stride, I64(r))]) for r in range(rows)]
            cells = [(r, c) for r in range(rows) for c in range(vectors)]
            lanes = {
                (r, c): cgutils.alloca_once_value(
                    builder, load_lanes(builder, acc_rows[r], I64(c * LANES), False)
                )
                for r, c in cells
            }
            with cgutils.for_range_slice(builder, I64(0), depth, I64(1), I64) as (j, _):
                v_row = builder.gep(v_base, [builder.mul(v_stride, j)])
                values = [load_lanes(builder, v_row, I64(c * LANES), is_bf16) for c in range(vectors)]
                for r in range(rows):
                    weight = splat(builder, builder.load(builder.gep(p_rows[r], [j])))
                    for c in range(vectors):
                        total = lanes[r, c]
                        builder.store(fma(builder, weight, values[c], builder.load(total)), total)
            for r, c in cells:
                target = builder.bitcast(builder.gep(acc_rows[r], [I64(c * LANES)]), VECTOR.as_pointer())
                builder.store(builder.load(lanes[r, c]), target, align=4)
            return context.get_dummy_value()

        return signature, codegen

    return tile  # type: ignore[no-any-return]


@intrinsic
def transpose_tile(typing_context: Any, source: Any, stride: Any, target: Any, target_stride: Any) -> Any:
    """``target[j * target_stride + i] = source[i * stride + j]`` for i, j < 8; source fp32 or bf16, target fp32."""
    is_bf16 = source.dtype == types.uint16
    signature = types.void(source, types.int64, target, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, stride, target, target_stride = args
        rows = [load_lanes(builder, base, builder.mul(stride, I64(i)), is_bf16) for i in range(LANES)]
        for step in (1, 2, 4):
            low = [i if i & step == 0 else LANES + i - step for i in range(LANES)]
            high = [i + step if i & step == 0 else LANES + i for i in range(LANES)]
            pairs = [(i, i + step) for i in range(LANES) if i & step == 0]
            for i, j in pairs:
                a, b = rows[i], rows[j]
                rows[i], rows[j] = shuffle(builder, a, b, low), shuffle(builder, a, b, high)
        for i, row in enumerate(rows):
            place = builder.gep(target, [builder.mul(target_stride, I64(i))])
            builder.store(row, builder.bitcast(place, VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature, codegen
