"""Makes `tl.dot` of bf16 right in Triton 3.6's interpreter, which multiplies the bit patterns; import it before use."""

from typing import Any

from charonia_kernels.gpu._launch import INTERPRETED

if INTERPRETED:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot

    def _widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, _widened(a), _widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot
