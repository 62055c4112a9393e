"""Arithmetic on packed keys and values, see `ipa.engines.kv_layout.KVLayout`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ipa.engines.engine import Array
from ipa.engines.kv_layout import KVLayout
from ipa.engines.spec import ComponentSpec, ImageSlots, image_mask, positions


def scale_values(image_kv: Array, layout: KVLayout, scale: float | Sequence[float]) -> Array:
    """`image_kv` with the values of every layer times `scale`: attention is linear in them.

    Args:
        image_kv: (batch, tokens, kv), unscaled, as an adapter's graph gives it.
        layout: where each layer's values lie.
        scale: weight of the image prompt, or of each layer; 0 gives the base model exactly.
    Returns:
        A new array of the same shape and dtype.
    """
    scales = scale if isinstance(scale, Sequence) else [scale] * len(layout.layers)
    scaled = image_kv.copy()
    for values, factor in zip(layout.value_slices(), scales, strict=True):
        scaled[..., values] *= scaled.dtype.type(factor)
    return scaled


def no_image_kv(layout: KVLayout, dtype: str) -> Array:
    """An unused adapter slot: one token of zeros, (1, 1, kv). Its values are 0, so it adds exactly 0."""
    return np.zeros((1, 1, layout.size), dtype)


def image_inputs(
    spec: ComponentSpec,
    layout: KVLayout,
    latents: tuple[int, int, int],
    images: Sequence[Array],
    masks: Sequence[Mapping[int, Array] | None] = (),
) -> dict[str, Array]:
    """What the UNet's image slots take: image prompts in the first ones, nothing in the others.

    Args:
        spec: the UNet's, which says how many slots there are and whether they have masks.
        layout: of keys and values.
        latents: batch, height and width.
        images: (batch, tokens, kv), one for each slot in use.
        masks: of each slot, (batch, positions) by level; `None`: the whole picture.
    """
    batch, height, width = latents
    slots, dtype = ImageSlots.of(spec), spec.outputs[0].dtype
    nothing = np.repeat(no_image_kv(layout, dtype), batch, axis=0)
    filled = [*images, *[nothing] * (slots.count - len(images))]
    inputs = dict(zip(slots.image_kv, filled, strict=True))
    for level in sorted(set(layout.levels)) if slots.has_masks else ():
        packed = np.ones((batch, slots.count, positions(level, height, width)), dtype)
        for slot, mask in enumerate(masks):
            if mask is not None:
                packed[:, slot] = mask[level]
        inputs[image_mask(level)] = packed
    return inputs
