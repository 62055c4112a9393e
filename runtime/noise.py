"""The noise PyTorch draws on the CPU, drawn by numpy: the same seed gives the same picture as in diffusers.

Both are Mersenne Twisters (MT19937); what differs is how their 32-bit words become normal values. Sizes below 16 and
sizes of 16 and more take two paths in PyTorch, which read the words in different ways; both are reproduced, and so is
the state between draws.

Against torch 2.13 on x86 with AVX2 or AVX-512, 1.6 million values of one draw are equal bit for bit; fused
multiply-adds are computed in float64 and rounded once more, which can change the last bit about once in 2**29 values.
PyTorch itself differs from that by up to 2.2e-6 where it has no AVX2 code (ARM, or ATEN_CPU_CAPABILITY=default).

Source: ATen's `core/MT19937RNGEngine.h`, `core/DistributionsHelper.h` and `native/cpu/DistributionTemplates.h`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ipa.engines.errors import RequestError
from ipa.runtime.box_muller import box_muller

SEED_LIMIT = 2**64
_BLOCK = 16  # values that PyTorch's vectorised path makes at once


class TorchGenerator:
    """Draws what `torch.Generator("cpu").manual_seed(seed)` draws.

    Args:
        seed: 0 to 2**64 - 1. PyTorch seeds its Mersenne Twister with the low 32 bits: 0 and 2**32 are the same noise.
    Raises:
        RequestError: the seed is not a whole number in that range.
    """

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < SEED_LIMIT:
            raise RequestError(f"seed is {seed!r}, expected a whole number from 0 to {SEED_LIMIT - 1}")
        self._twister = np.random.RandomState(int(seed) & 0xFFFFFFFF)
        self._second_normal: float | None = None  # of the last pair, kept for the next small draw

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Standard normal float32 values, as `torch.randn(shape, generator=generator)`."""
        size = math.prod(shape)
        if size >= _BLOCK:
            return self._draw_blocks(size).reshape(shape)
        return np.array([self._draw_one() for _ in range(size)], np.float32).reshape(shape)

    def _words(self, count: int) -> NDArray[np.uint32]:
        return self._twister.randint(0, 2**32, count, dtype=np.uint32)

    def _draw_blocks(self, size: int) -> NDArray[np.float32]:
        uniforms = self._uniform_floats(size)
        whole = size - size % _BLOCK
        normals = np.empty(size, np.float32)
        normals[:whole] = box_muller(uniforms[:whole].reshape(-1, 2, _BLOCK // 2)).ravel()
        if whole < size:
            # PyTorch fills a last, partial block by drawing the last 16 values anew, over some that it has made.
            normals[-_BLOCK:] = box_muller(self._uniform_floats(_BLOCK).reshape(1, 2, _BLOCK // 2)).ravel()
        return normals

    def _uniform_floats(self, count: int) -> NDArray[np.float32]:
        """The low 24 bits of one word each, in [0, 1)."""
        return (self._words(count) & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2**-24)

    def _uniform_double(self) -> float:
        """The low 53 bits of two words, the high one first, in [0, 1)."""
        high, low = self._words(2).tolist()
        return float(((high << 32 | low) & (2**53 - 1)) * 2.0**-53)

    def _draw_one(self) -> float:
        """Box-Muller in float64; each pair serves two calls."""
        if self._second_normal is not None:
            normal, self._second_normal = self._second_normal, None
            return normal
        angle, radius = 2 * math.pi * self._uniform_double(), math.sqrt(-2 * math.log1p(-self._uniform_double()))
        self._second_normal = radius * math.sin(angle)
        return radius * math.cos(angle)
