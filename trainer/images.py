"""Training images: opened safely, cut to a square, turned into numbers."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 32_000_000  # decoded: 96 MB of RGB
MIN_SIDE = 16
MAX_ASPECT = 20.0


class ImageError(Exception):
    """An image cannot be used; the message is the reason, without the file's name."""


def open_image(path: Path) -> Image.Image:
    """Decode the first frame of an image file, upright and RGB.

    The size is judged from the header, before anything is decoded. Only the listed formats are tried, so a PDF or
    PostScript file under the name of a picture never reaches its decoder.

    Raises:
        ImageError: missing, not an image, damaged, too large, too small or too long.
    """
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise ImageError("the file is missing or cannot be read") from error
    if size == 0:
        raise ImageError("the file is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, higher pixel limit and metadata remarks
            with Image.open(path, formats=FORMATS) as image:
                _check_size(image.width, image.height)
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"more than the limit of {MAX_PIXELS // 1_000_000} megapixels") from error
    except UnidentifiedImageError as error:
        raise ImageError("not a JPEG, PNG, WebP, BMP, TIFF or GIF image") from error
    except Exception as error:  # decoders raise a dozen types on damaged files
        raise ImageError("damaged or cut off: it cannot be decoded") from error


def square_pixels(image: Image.Image, resolution: int) -> NDArray[np.float32]:
    """The image's centre square as (3, resolution, resolution) in [-1, 1].

    The same as resizing the shortest side and cropping the centre, without the pixels that the crop throws away.
    """
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    square = image.resize((resolution, resolution), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    pixels = np.asarray(square, dtype=np.float32) / 127.5 - 1.0
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels, more than the limit of {MAX_PIXELS // 1_000_000} megapixels")
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{width} x {height} pixels, expected at least {MIN_SIDE} on each side")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{width} x {height} pixels, longer than {MAX_ASPECT:.0f} to 1")


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB with 8 bits a channel; 16-bit grey is scaled, where Pillow alone would clip it."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.uint32) >> 8
        return Image.fromarray(np.minimum(grey, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
