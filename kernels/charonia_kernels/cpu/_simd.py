"""Raw pointers, bf16 conversion and vector lanes: what numba code has no words for, emitted as LLVM instructions."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
CACHE_LINE = 64
I64 = ir.IntType(64)
F32 = ir.FloatType()
VECTOR = ir.VectorType(F32, LANES)


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
            fields = builder.bitcast(args[0], I64.as_pointer())
            counter = builder.gep(fields, [I64(position)])
            return builder.atomic_rmw("add", counter, I64(1), "monotonic")

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
        return load_scalar(builder, args[0], args[1], is_bf16)

    return types.float32(base, types.int64), codegen


@intrinsic
def store(typing_context: Any, base: Any, index: Any, value: Any) -> Any:
    """Write an fp32 value behind a pointer to fp32, or rounded to nearest even behind a pointer to bf16 (uint16)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store_scalar(builder, args[2], builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(base, types.int64, types.float32), codegen


def load_lanes(builder: Any, base: Any, index: Any, is_bf16: bool) -> Any:
    """8 consecutive elements from ``base + index`` as fp32 lanes."""
    element = builder.gep(base, [index])
    if not is_bf16:
        return builder.load(builder.bitcast(element, VECTOR.as_pointer()), align=4)
    narrow = ir.VectorType(ir.IntType(16), LANES)
    wide = ir.VectorType(ir.IntType(32), LANES)
    bits = builder.load(builder.bitcast(element, narrow.as_pointer()), align=2)
    shift = ir.Constant(wide, [16] * LANES)
    return builder.bitcast(builder.shl(builder.zext(bits, wide), shift), VECTOR)


def load_scalar(builder: Any, base: Any, index: Any, is_bf16: bool) -> Any:
    """One element from ``base + index`` as fp32."""
    value = builder.load(builder.gep(base, [index]))
    if not is_bf16:
        return value
    i32 = ir.IntType(32)
    return builder.bitcast(builder.shl(builder.zext(value, i32), ir.Constant(i32, 16)), F32)


def store_scalar(builder: Any, value: Any, target: Any) -> None:
    """Write an fp32 value to a pointer to fp32, or rounded to nearest even to a pointer to bf16 bits."""
    if target.type.pointee == F32:
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


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` with one rounding, of scalars or vectors."""
    suffix = f"v{LANES}f32" if c.type == VECTOR else "f32"
    function_type = ir.FunctionType(c.type, [c.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.fma.{suffix}")
    return builder.call(function, [a, b, c])


def shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """Lanes of ``a`` (0 to 7) and ``b`` (8 to 15)."""
    index = ir.VectorType(ir.IntType(32), LANES)
    return builder.shuffle_vector(a, b, ir.Constant(index, lanes))


def splat(builder: Any, scalar: Any) -> Any:
    """The scalar in every lane."""
    first = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), scalar, ir.IntType(32)(0))
    return shuffle(builder, first, first, [0] * LANES)


def prefetch_line(builder: Any, base: Any, distance: Any) -> None:
    """Ask for the cache line ``distance`` bytes behind ``base`` to be brought into the L2 cache; never faults."""
    byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    line = builder.gep(builder.bitcast(base, byte), [distance])
    builder.call(function, [line, i32(0), i32(2), i32(1)])  # to read, into L2, data


@intrinsic
def prefetch(typing_context: Any, base: Any, elements: Any) -> Any:
    """Ask for ``elements`` values behind a pointer to be brought into the L2 cache."""
    signature = types.void(base, types.int64)
    size = base.dtype.bitwidth // 8

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        end = builder.mul(args[1], I64(size))
        with cgutils.for_range_slice(builder, I64(0), end, I64(CACHE_LINE), I64) as (distance, _):
            prefetch_line(builder, args[0], distance)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def largest(typing_context: Any, base: Any, count: Any, start: Any) -> Any:
    """The largest of ``start`` and ``count`` fp32 values; NaN is passed over.

    Explicit, because without fast-math assumptions about NaN the compiler keeps a maximum scalar.
    """
    signature = types.float32(base, types.int64, types.float32)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, count, start = args
        lanes = cgutils.alloca_once_value(builder, splat(builder, start))
        whole = builder.and_(count, I64(-LANES))
        with cgutils.for_range_slice(builder, I64(0), whole, I64(LANES), I64) as (i, _):
            value, peak = load_lanes(builder, base, i, False), builder.load(lanes)
            builder.store(builder.select(builder.fcmp_ordered(">", value, peak), value, peak), lanes)
        result = cgutils.alloca_once_value(builder, start)

        def offer(value: Any) -> None:
            peak = builder.load(result)
            builder.store(builder.select(builder.fcmp_ordered(">", value, peak), value, peak), result)

        final = builder.load(lanes)
        for lane in range(LANES):
            offer(builder.extract_element(final, ir.IntType(32)(lane)))
        with cgutils.for_range_slice(builder, whole, count, I64(1), I64) as (i, _):
            offer(builder.load(builder.gep(base, [i])))
        return builder.load(result)

    return signature, codegen
