"""The batch that the UNet sees: negative and positive halves for one or several pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


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
