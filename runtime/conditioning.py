"""What the UNet is told: negative and positive halves of image prompts, for one or several pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipa.engines.engine import Engine
from ipa.engines.errors import BundleError
from ipa.engines.manifest import ZERO_FEATURE, ZERO_PIXELS, AdapterRecord

Array = NDArray[Any]


def image_features(encoder: Engine, pixel_values: Array, name: str, adapter: AdapterRecord) -> Array:
    """What an adapter reads of some images, for both halves.

    Args:
        encoder: component `image_encoder`.
        pixel_values: (images, 3, size, size), normalised.
        name, adapter: the adapter, which says which feature it reads and how the negative half is made.
    Returns:
        (2 * images, ...), all negatives first.
    Raises:
        BundleError: the negative half is made in a way that only a later version knows.
    """
    pixel_values = pixel_values.astype(encoder.spec.inputs[0].dtype)
    if adapter.negative == ZERO_FEATURE:
        features = encoder(pixel_values=pixel_values)[adapter.feature]
        return np.concatenate([np.zeros_like(features), features])
    if adapter.negative == ZERO_PIXELS:
        with_zeros = np.concatenate([np.zeros_like(pixel_values[:1]), pixel_values])
        features = encoder(pixel_values=with_zeros)[adapter.feature]
        return np.concatenate([np.repeat(features[:1], len(pixel_values), axis=0), features[1:]])
    raise BundleError(
        f"adapter '{name}' makes its negative tokens by {adapter.negative!r}, this ipa-runtime knows "
        f"{ZERO_FEATURE!r} and {ZERO_PIXELS!r}; upgrade with `pip install -U ipa-runtime`"
    )


def guidance_batch(requests: Sequence[Array], counts: Sequence[int], has_guidance: bool) -> Array:
    """The UNet batch for the pictures of several requests: all negatives first, then all positives.

    Args:
        requests: of each (2, ...) negative and positive, or (1, ...) for both alike.
        counts: pictures of each.
    Returns:
        (2 * pictures, ...) with guidance, else (pictures, ...) of the positive halves.
    """
    positives = [np.repeat(halves[-1:], count, axis=0) for halves, count in zip(requests, counts, strict=True)]
    if not has_guidance:
        return np.concatenate(positives)
    negatives = [np.repeat(halves[:1], count, axis=0) for halves, count in zip(requests, counts, strict=True)]
    return np.concatenate([*negatives, *positives])
