"""Box-Muller in float32, rounded as PyTorch rounds it on x86 CPUs with AVX2.

PyTorch computes logarithm, sine and cosine here with the single precision polynomials of the Cephes library, eight
values at a time, compiled to fused multiply-adds. numpy's own float32 functions differ from those in the last bits,
and from one CPU to the next. These are spelled out in operations that round the same way everywhere, so the noise of
a seed is the same on every machine.

Source: Cephes `logf.c` and `sinf.c`; ATen's `native/cpu/avx_mathfun.h` for the order of operations.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32s = NDArray[np.float32]

_TWO_PI = np.float32(2 * np.pi)
_FOUR_OVER_PI = np.float32(4 / np.pi)
_SQRT_HALF = np.float32(np.sqrt(0.5))
# ln 2 and pi / 4 in parts: the first ones have few bits, so that their products with small integers are exact.
_LN2_PARTS = (np.float32(0.693359375), np.float32(-2.12194440e-4))
_QUARTER_PI_PARTS = (np.float32(0.78515625), np.float32(2.4187564849853515625e-4), np.float32(3.77489497744594108e-8))
_LOG_COEFFICIENTS = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_SIN_COEFFICIENTS = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS_COEFFICIENTS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)


def box_muller(uniforms: Float32s) -> Float32s:
    """Standard normal values from uniform ones.

    Args:
        uniforms: (blocks, 2, 8) in [0, 1): each block holds eight radii, then eight angles.
    Returns:
        (blocks, 2, 8): each block holds eight values from the cosine, then the eight of the same pairs from the sine.
    Source: ATen's `native/cpu/DistributionTemplates.h`, `NormalFill16<float>`.
    """
    radius = np.sqrt(np.float32(-2) * _log(np.float32(1) - uniforms[:, 0]))
    sin, cos = _sin_cos(_TWO_PI * uniforms[:, 1])
    return np.stack([radius * cos, radius * sin], axis=1)


def _fma(a: Float32s, b: Float32s | np.float32, c: Float32s | np.float32) -> Float32s:
    """`a * b + c` with one rounding: the product of two float32 is exact in float64."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _polynomial(x: Float32s, coefficients: tuple[float, ...]) -> Float32s:
    """Horner's rule, the highest power first."""
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = _fma(y, x, np.float32(coefficient))
    return y


def _log(x: Float32s) -> Float32s:
    """Natural logarithm of positive, normal float32."""
    mantissa, exponents = np.frexp(x)
    is_low = mantissa < _SQRT_HALF
    exponent = (exponents - is_low).astype(np.float32)
    x = np.where(is_low, mantissa - np.float32(1) + mantissa, mantissa - np.float32(1))
    square = x * x
    y = _fma(_polynomial(x, _LOG_COEFFICIENTS) * x, square, exponent * _LN2_PARTS[1])
    y = _fma(square, np.float32(-0.5), y)
    return _fma(exponent, _LN2_PARTS[0], x + y)


def _sin_cos(x: Float32s) -> tuple[Float32s, Float32s]:
    """Sine and cosine of angles from 0 to 2 pi."""
    octant = ((x * _FOUR_OVER_PI).astype(np.int32) + 1) & ~1  # rounded to even: the rest lies in -pi/4 to pi/4
    for part in _QUARTER_PI_PARTS:
        x = _fma(octant.astype(np.float32), -part, x)
    square = x * x
    cos = _polynomial(square, _COS_COEFFICIENTS) * square
    cos = _fma(cos, square, np.float32(-0.5) * square) + np.float32(1)
    sin = _fma(_polynomial(square, _SIN_COEFFICIENTS) * square, x, x)
    is_swapped = octant & 2 != 0
    sin, cos = np.where(is_swapped, cos, sin), np.where(is_swapped, sin, cos)
    return np.where(octant & 4, -sin, sin), np.where((octant + 2) & 4, -cos, cos)
