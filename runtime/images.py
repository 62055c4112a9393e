"""Pictures to arrays and back: CLIP preprocessing, and the VAE's output as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ipa.engines.errors import RequestError
from ipa.engines.manifest import ImageProcessorRecord
from ipa.runtime.image_files import open_image, read_image

__all__ = ["MAX_ASPECT_RATIO", "open_image", "preprocess", "read_image", "to_images"]

FloatArray: TypeAlias = NDArray[np.float32]

# The long edge grows with the short one before the crop: 1 x 10000 pixels would become 224 x 2,240,000.
MAX_ASPECT_RATIO = 100


def preprocess(images: Sequence[Image.Image], processor: ImageProcessorRecord) -> FloatArray:
    """Reference images as the image encoder's input, bit for bit what `CLIPImageProcessorPil` gives.

    Args:
        images: RGB pictures of any size.
        processor: the encoder's size, mean and standard deviation.

    Returns:
        `pixel_values`, (len(images), 3, size, size) float32, normalised.

    Raises:
        RequestError: a picture is over 100 times longer than wide, or wider than long.

    Source: transformers 5.23, models/clip/image_processing_pil_clip.py.
    """
    return np.stack([_pixel_values(image, processor) for image in images])


def _pixel_values(image: Image.Image, processor: ImageProcessorRecord) -> FloatArray:
    """One picture: shortest edge to `size`, centre crop, scale to 0..1, normalise."""
    size, short, long = processor.size, min(image.size), max(image.size)
    if long > MAX_ASPECT_RATIO * short:
        raise RequestError(
            f"image of {image.width} x {image.height} pixels: one edge is over {MAX_ASPECT_RATIO} times the other, "
            "and the encoder sees a square; crop it first"
        )
    resized_long = int(size * long / short)
    width, height = (size, resized_long) if image.width <= image.height else (resized_long, size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    cropped = resized.crop((left, top, left + size, top + size))
    # The oracle multiplies in float64 and rounds to float32 before it normalises.
    scaled = (np.asarray(cropped) * (1 / 255)).astype(np.float32)
    mean, std = np.array(processor.mean, np.float32), np.array(processor.std, np.float32)
    return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1))


def to_images(image: FloatArray) -> list[Image.Image]:
    """The VAE decoder's output as RGB pictures, byte for byte what diffusers' `VaeImageProcessor` gives.

    Args:
        image: (batch, 3, height, width) float32, -1 black, 1 white; values outside are clipped. No NaN.

    Source: diffusers 0.42.1, image_processor.py, `VaeImageProcessor.postprocess`.
    """
    scaled = np.clip(image * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255)
    # `np.rint` rounds halves to even, as the oracle does.
    pixels = np.ascontiguousarray(np.rint(scaled).astype(np.uint8).transpose(0, 2, 3, 1))
    return [Image.fromarray(picture) for picture in pixels]
