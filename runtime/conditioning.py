"""The batch that the UNet sees: negative and positive halves for one or several pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


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
