"""Elementary functions that the loop vectoriser can inline (libm calls cannot be vectorised)."""

import numpy as np

from charonia_kernels.cpu._jit import strict_jit

_LOG2_E = np.float32(1.44269504)
# ln 2 in two parts: the first has few bits, so that n * _LN2_HIGH is exact for |n| <= 127.
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_LOWEST = np.float32(-87.3)
_HIGHEST = np.float32(89.0)


@strict_jit
def exp_f32(x):  # type: ignore[no-untyped-def]
    """``exp(x)`` in fp32 to about 1 ulp, by range reduction with ln 2 and a polynomial.

    Infinite from 88.4 on; below -87.3, where the result would be subnormal, that of -87.3.
    """
    x = min(max(x, _LOWEST), _HIGHEST)
    n = np.floor(x * _LOG2_E + np.float32(0.5))
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r + np.float32(1.0)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return p * power
