"""Vector building blocks of the CPU kernels: raw pointers, bf16 conversion, and two register-tiled products.

The products are emitted as explicit 8-lane vector code rather than left to the loop vectoriser, for two reasons: the
tile stays in registers whatever the compiler's mood, and the order of the additions for one output is the same for
every tile shape. A row's result therefore does not depend on how many rows it is computed with.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
_I64 = ir.IntType(64)
_F32 = ir.FloatType()
_VEC = ir.VectorType(_F32, LANES)


@intrinsic
def pointer(typing_context: Any, address: Any, dtype: Any) -> Any:
    """The integer ``address`` as a typed pointer."""
    result = types.CPointer(dtype.instance_type)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return result(address, dtype), codegen


@intrinsic
def offset(typing_context: Any, base: Any, elements: Any) -> Any:
    """``base + elements``, in elements."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return base(base, types.int64), codegen


def _claim_field(position: int) -> Callable[[Any], int]:
    @intrinsic
    def claim(typing_context: Any, record: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            fields = builder.bitcast(args[0], _I64.as_pointer())
            counter = builder.gep(fields, [_I64(position)])
            return builder.atomic_rmw("add", counter, _I64(1), "monotonic")

        return types.int64(record), codegen

    return claim  # type: ignore[no-any-return]


claim_item = _claim_field(0)
"""Atomically take the next work item of an argument record."""
claim_worker = _claim_field(1)
"""Atomically take a worker number, for kernels whose workers own scratch memory."""


@intrinsic
def load(typing_context: Any, base: Any, index: Any) -> Any:
    """Element ``index`` behind a pointer to fp32 or bf16 (uint16), as fp32."""
    is_bf16 = base.dtype == types.uint16

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load_scalar(builder, args[0], args[1], is_bf16)

    return types.float32(base, types.int64), codegen


@intrinsic
def store(typing_context: Any, base: Any, index: Any, value: Any) -> Any:
    """Write an fp32 value behind a pointer to fp32, or rounded to nearest even behind a pointer to bf16 (uint16)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store_scalar(builder, args[2], builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(base, types.int64, types.float32), codegen


def _load_lanes(builder: Any, base: Any, index: Any, is_bf16: bool) -> Any:
    """8 consecutive elements from ``base + index`` as fp32 lanes."""
    element = builder.gep(base, [index])
    if not is_bf16:
        return builder.load(builder.bitcast(element, _VEC.as_pointer()), align=4)
    narrow = ir.VectorType(ir.IntType(16), LANES)
    wide = ir.VectorType(ir.IntType(32), LANES)
    bits = builder.load(builder.bitcast(element, narrow.as_pointer()), align=2)
    shift = ir.Constant(wide, [16] * LANES)
    return builder.bitcast(builder.shl(builder.zext(bits, wide), shift), _VEC)


def _load_scalar(builder: Any, base: Any, index: Any, is_bf16: bool) -> Any:
    value = builder.load(builder.gep(base, [index]))
    if not is_bf16:
        return value
    i32 = ir.IntType(32)
    return builder.bitcast(builder.shl(builder.zext(value, i32), ir.Constant(i32, 16)), _F32)


def _store_scalar(builder: Any, value: Any, target: Any) -> None:
    """Write an fp32 value to a pointer to fp32, or rounded to nearest even to a pointer to bf16 bits."""
    if target.type.pointee == _F32:
        builder.store(value, target)
        return
    i32, i16 = ir.IntType(32), ir.IntType(16)
    bits = builder.bitcast(value, i32)
    odd = builder.and_(builder.lshr(bits, i32(16)), i32(1))
    rounded = builder.add(builder.add(bits, i32(0x7FFF)), odd)
    is_nan = builder.fcmp_unordered("uno", value, value)
    builder.store(
        builder.trunc(builder.lshr(builder.select(is_nan, i32(0x7FC00000), rounded), i32(16)), i16), target
    )


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    suffix = f"v{LANES}f32" if c.type == _VEC else "f32"
    function_type = ir.FunctionType(c.type, [c.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.fma.{suffix}")
    return builder.call(function, [a, b, c])


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """Lanes of ``a`` (0 to 7) and ``b`` (8 to 15)."""
    index = ir.VectorType(ir.IntType(32), LANES)
    return builder.shuffle_vector(a, b, ir.Constant(index, lanes))


def _sum_each(builder: Any, vectors: list[Any]) -> list[Any]:
    """The sum of the lanes of each vector, as scalars.

    Eight vectors are folded together: each step adds lanes that are ``step`` apart and packs the sums of two vectors
    into one. Every vector is summed in the same order, whatever its place and whatever the others are.
    """
    sums: list[Any] = []
    for first in range(0, len(vectors), LANES):
        group = vectors[first : first + LANES]
        packed = [*group, *[ir.Constant(_VEC, ir.Undefined)] * (LANES - len(group))]
        for step in (1, 2, 4):
            low = [i if i & step == 0 else LANES + i - step for i in range(LANES)]
            high = [i + step if i & step == 0 else LANES + i for i in range(LANES)]
            packed = [
                builder.fadd(_shuffle(builder, a, b, low), _shuffle(builder, a, b, high))
                for a, b in zip(packed[::2], packed[1::2], strict=True)
            ]
        sums += [builder.extract_element(packed[0], ir.IntType(32)(i)) for i in range(len(group))]
    return sums


def dot_tile(rows: int, columns: int) -> Callable[..., None]:
    """A jit function ``(x, x_stride, w, w_stride, depth, bias, out, out_stride)``.

    ``out[r * out_stride + c] = bias[c] + sum_k x[r * x_stride + k] * w[c * w_stride + k]`` for r < rows, c < columns.
    x and bias point to fp32 (bias may be null), w and out to fp32 or bf16; strides are in elements.
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
            zero = ir.Constant(_VEC, [0.0] * LANES)
            cells = [(r, c) for r in range(rows) for c in range(columns)]
            x_rows = [builder.gep(x_base, [builder.mul(x_stride, _I64(r))]) for r in range(rows)]
            w_rows = [builder.gep(w_base, [builder.mul(w_stride, _I64(c))]) for c in range(columns)]
            lanes = {cell: cgutils.alloca_once_value(builder, zero) for cell in cells}
            whole = builder.and_(depth, _I64(-LANES))
            with cgutils.for_range_slice(builder, _I64(0), whole, _I64(LANES), _I64) as (k, _):
                w_values = [_load_lanes(builder, base, k, is_bf16) for base in w_rows]
                for r in range(rows):
                    x_value = _load_lanes(builder, x_rows[r], k, False)
                    for c in range(columns):
                        accumulator = lanes[r, c]
                        builder.store(
                            _fma(builder, x_value, w_values[c], builder.load(accumulator)), accumulator
                        )
            sums = {cell: cgutils.alloca_once(builder, _F32) for cell in cells}
            totals = _sum_each(builder, [builder.load(lanes[cell]) for cell in cells])
            for cell, total in zip(cells, totals, strict=True):
                builder.store(total, sums[cell])
            with cgutils.for_range_slice(builder, whole, depth, _I64(1), _I64) as (k, _):
                w_scalars = [_load_scalar(builder, base, k, is_bf16) for base in w_rows]
                for r in range(rows):
                    x_scalar = builder.load(builder.gep(x_rows[r], [k]))
                    for c in range(columns):
                        total = sums[r, c]
                        builder.store(_fma(builder, x_scalar, w_scalars[c], builder.load(total)), total)
            with builder.if_then(cgutils.is_not_null(builder, bias)):
                for c in range(columns):
                    addend = builder.load(builder.gep(bias, [_I64(c)]))
                    for r in range(rows):
                        builder.store(builder.fadd(builder.load(sums[r, c]), addend), sums[r, c])
            for r, c in cells:
                position = builder.add(builder.mul(out_stride, _I64(r)), _I64(c))
                _store_scalar(builder, builder.load(sums[r, c]), builder.gep(out_base, [position]))
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
            p_rows = [builder.gep(p_base, [builder.mul(p_stride, _I64(r))]) for r in range(rows)]
            acc_rows = [builder.gep(acc_base, [builder.mul(acc_stride, _I64(r))]) for r in range(rows)]
            cells = [(r, c) for r in range(rows) for c in range(vectors)]
            lanes = {
                (r, c): cgutils.alloca_once_value(
                    builder, _load_lanes(builder, acc_rows[r], _I64(c * LANES), False)
                )
                for r, c in cells
            }
            with cgutils.for_range_slice(builder, _I64(0), depth, _I64(1), _I64) as (j, _):
                v_row = builder.gep(v_base, [builder.mul(v_stride, j)])
                values = [_load_lanes(builder, v_row, _I64(c * LANES), is_bf16) for c in range(vectors)]
                for r in range(rows):
                    weight = _splat(builder, builder.load(builder.gep(p_rows[r], [j])))
                    for c in range(vectors):
                        total = lanes[r, c]
                        builder.store(_fma(builder, weight, values[c], builder.load(total)), total)
            for r, c in cells:
                target = builder.bitcast(builder.gep(acc_rows[r], [_I64(c * LANES)]), _VEC.as_pointer())
                builder.store(builder.load(lanes[r, c]), target, align=4)
            return context.get_dummy_value()

        return signature, codegen

    return tile  # type: ignore[no-any-return]


def _splat(builder: Any, scalar: Any) -> Any:
    first = builder.insert_element(ir.Constant(_VEC, ir.Undefined), scalar, ir.IntType(32)(0))
    return _shuffle(builder, first, first, [0] * LANES)


@intrinsic
def largest(typing_context: Any, base: Any, count: Any, start: Any) -> Any:
    """The largest of ``start`` and ``count`` fp32 values; NaN is passed over.

    Explicit, because without fast-math assumptions about NaN the compiler keeps a maximum scalar.
    """
    signature = types.float32(base, types.int64, types.float32)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, count, start = args
        lanes = cgutils.alloca_once_value(builder, _splat(builder, start))
        whole = builder.and_(count, _I64(-LANES))
        with cgutils.for_range_slice(builder, _I64(0), whole, _I64(LANES), _I64) as (i, _):
            value, peak = _load_lanes(builder, base, i, False), builder.load(lanes)
            builder.store(builder.select(builder.fcmp_ordered(">", value, peak), value, peak), lanes)
        result = cgutils.alloca_once_value(builder, start)

        def offer(value: Any) -> None:
            peak = builder.load(result)
            builder.store(builder.select(builder.fcmp_ordered(">", value, peak), value, peak), result)

        final = builder.load(lanes)
        for lane in range(LANES):
            offer(builder.extract_element(final, ir.IntType(32)(lane)))
        with cgutils.for_range_slice(builder, whole, count, _I64(1), _I64) as (i, _):
            offer(builder.load(builder.gep(base, [i])))
        return builder.load(result)

    return signature, codegen


@intrinsic
def transpose_tile(typing_context: Any, source: Any, stride: Any, target: Any, target_stride: Any) -> Any:
    """``target[j * target_stride + i] = source[i * stride + j]`` for i, j < 8; source fp32 or bf16, target fp32."""
    is_bf16 = source.dtype == types.uint16
    signature = types.void(source, types.int64, target, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, stride, target, target_stride = args
        rows = [_load_lanes(builder, base, builder.mul(stride, _I64(i)), is_bf16) for i in range(LANES)]
        for step in (1, 2, 4):
            low = [i if i & step == 0 else LANES + i - step for i in range(LANES)]
            high = [i + step if i & step == 0 else LANES + i for i in range(LANES)]
            pairs = [(i, i + step) for i in range(LANES) if i & step == 0]
            for i, j in pairs:
                a, b = rows[i], rows[j]
                rows[i], rows[j] = _shuffle(builder, a, b, low), _shuffle(builder, a, b, high)
        for i, row in enumerate(rows):
            place = builder.gep(target, [builder.mul(target_stride, _I64(i))])
            builder.store(row, builder.bitcast(place, _VEC.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature, codegen
