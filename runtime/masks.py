"""Region masks of image prompts: where in the picture an image counts, as each level of the UNet sees it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ipa.engines.errors import RequestError
from ipa.engines.spec import positions

FloatArray = NDArray[np.float32]

_SHARPNESS = -0.75  # of torch's bicubic filter
_TAPS = 4


def binary_mask(image: Image.Image, height: int, width: int) -> FloatArray:
    """A mask at the picture's size: 1 where it is bright, 0 where it is dark.

    Args:
        image: an RGB picture.
    Returns:
        (height, width), only 0 and 1.
    Source: diffusers 0.42.1, image_processor.py, `IPAdapterMaskProcessor.preprocess`.
    """
    grey = image.resize((width, height), Image.Resampling.LANCZOS).convert("L")
    return (np.asarray(grey, np.float32) / 255 >= 0.5).astype(np.float32)


def check_ratio(what: str, mask: Image.Image, size: tuple[int, int], slack: int = 1) -> None:
    """Refuse a mask that would be stretched out of shape to fit what it is a mask of.

    Args:
        what: name of the mask, for the message.
        size: width and height of what it is a mask of.
        slack: pixels along a side, of either picture, that may be missing.
    Raises:
        RequestError: the sides have another ratio.
    """
    width, height = size
    if abs(mask.width * height - mask.height * width) > slack * max(*mask.size, *size):
        raise RequestError(
            f"{what} is {mask.width}x{mask.height}, the picture {width}x{height}: crop the mask to the same ratio"
        )


def mask_level(mask: FloatArray, level: int, latent_height: int, latent_width: int) -> FloatArray:
    """A mask as the layers of one resolution take it, (positions,).

    Source: diffusers 0.42.1, `IPAdapterMaskProcessor.downsample`: from the number of positions it derives a grid of
    about the mask's ratio, resizes to it with values beyond 0 and 1, and cuts or pads the end.
    """
    count = positions(level, latent_height, latent_width)
    height = int(math.sqrt(count / (mask.shape[1] / mask.shape[0])))
    height += count % height != 0
    width = count // height
    flat = _resize(_resize(mask, height, 0), width, 1).ravel()[:count]
    return np.pad(flat, (0, count - len(flat)))


def _resize(image: FloatArray, size: int, axis: int) -> FloatArray:
    """Bicubic along one axis, as `torch.nn.functional.interpolate` without antialiasing: each output reads 4 inputs."""
    before = image.shape[axis]
    centre = (np.arange(size) + 0.5) * (before / size) - 0.5
    first = np.floor(centre).astype(int) - 1
    taps = first[:, None] + np.arange(_TAPS)
    weights = _cubic(np.abs(centre[:, None] - taps)).astype(np.float32)
    gathered = np.take(image, np.clip(taps, 0, before - 1), axis=axis)
    resized: FloatArray = np.einsum("ot,otw->ow" if axis == 0 else "ot,hot->ho", weights, gathered)
    return resized


def _cubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """The filter's value at a distance of 0 to 2. Source: R. Keys, IEEE TASSP 29 (1981), formula (4)."""
    near = ((_SHARPNESS + 2) * distance - (_SHARPNESS + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance - 4
    return np.where(distance <= 1, near, np.where(distance < 2, _SHARPNESS * far, 0.0))
