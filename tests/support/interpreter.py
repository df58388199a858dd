"""Makes Triton's interpreter compute as the hardware does; import it before running kernels.

Triton's interpreter (3.6 and 3.7) truncates fp32 to bf16, its rounding of other narrow types loses the carry into the
exponent, and its `tl.dot` multiplies the bit patterns of bf16 matrices. Here PyTorch converts, to nearest, ties to
even, and `tl.dot` multiplies values. (Where fp8 overflows, the hardware saturates and PyTorch gives NaN: kernels have
to clamp.)
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from charonia_kernels.gpu._launch import INTERPRETED

_DTYPES = {
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def convert_float(source: np.ndarray, source_type: Any, target_type: Any, rounding_mode: Any) -> np.ndarray:
    """Bits of `source`, an array of any type of the same width, converted; same shape, unsigned integers."""
    del rounding_mode
    # As the interpreter does: the type may be that of a block.
    source_dtype, target_dtype = _DTYPES[source_type.scalar], _DTYPES[target_type.scalar]
    array = np.ascontiguousarray(source).reshape(-1)
    bits = torch.from_numpy(array.view(f"int{8 * source_dtype.itemsize}").copy())
    converted = bits.view(source_dtype).to(torch.float32 if source_dtype.itemsize < 4 else source_dtype)
    result = converted.to(target_dtype).view(_BITS[target_dtype.itemsize]).numpy()
    return result.view(f"uint{8 * target_dtype.itemsize}").reshape(np.shape(source))


if INTERPRETED:
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    _create_dot = InterpreterBuilder.create_dot

    def _widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return _create_dot(self, _widened(a), _widened(b), *rest)

    interpreter._convert_float = convert_float
    InterpreterBuilder.create_dot = create_dot
