"""What conditions the UNet: packed keys and values of text and image, computed once per request."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipa.engines.spec import KVLayout

Array = NDArray[Any]


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


def guidance_batch(halves: Array, num_images: int, has_guidance: bool) -> Array:
    """The UNet batch for `num_images` pictures: all negatives first, then all positives.

    Args:
        halves: (2, ...) negative and positive, or (1, ...) for both alike.
    Returns:
        (2 * num_images, ...) with guidance, else (num_images, ...) of the positive half.
    """
    if not has_guidance:
        return np.repeat(halves[-1:], num_images, axis=0)
    return np.repeat(np.broadcast_to(halves, (2, *halves.shape[1:])), num_images, axis=0)
