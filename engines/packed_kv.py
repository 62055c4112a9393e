"""Arithmetic on packed keys and values, see `ipa.engines.spec.KVLayout`."""

from __future__ import annotations

import numpy as np

from ipa.engines.engine import Array
from ipa.engines.spec import KVLayout


def scale_values(image_kv: Array, layout: KVLayout, scale: float) -> Array:
    """`image_kv` with the values of every layer times `scale`: attention is linear in them.

    Args:
        image_kv: (batch, tokens, kv), unscaled, as an adapter's graph gives it.
        layout: where each layer's values lie.
        scale: weight of the image prompt; 0 gives the base model exactly.
    Returns:
        A new array of the same shape and dtype.
    """
    scaled = image_kv.copy()
    for values in layout.value_slices():
        scaled[..., values] *= scaled.dtype.type(scale)
    return scaled


def no_image_kv(layout: KVLayout, dtype: str) -> Array:
    """An unused adapter slot: one token of zeros, (1, 1, kv). Its values are 0, so it adds exactly 0."""
    return np.zeros((1, 1, layout.size), dtype)
