"""Pictures from files that nobody vouches for, as 8-bit RGB."""

from __future__ import annotations

import logging
import stat
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ipa.engines.errors import RequestError
from ipa.runtime import jpeg_segments, png_chunks

MAX_PIXELS = 32_000_000
# More than 32 megapixels of 16-bit RGBA; a bigger file is not a picture that we would open.
_MAX_FILE_BYTES = 512 * 1024**2
_MAX_EXIF_BYTES = 1024**2

# Always named: left alone, Pillow also tries EPS (which starts Ghostscript), PSD and dozens of rare decoders.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

# Without a handler, Python prints Pillow's remarks on broken files to stderr; ours is the one message there.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# EXIF orientation -> what turns the picture upright. Source: CIPA DC-008 (Exif 2.32).
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(image: Image.Image | Path | str) -> Image.Image:
    """A file by `read_image`, or a picture that is open already, as upright 8-bit RGB by the same rules.

    Raises:
        RequestError: see `read_image`.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(_upright(image), "image")
    return read_image(Path(image))


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame of a PNG, JPEG, WebP, GIF, BMP or TIFF file, upright, as RGB.

    Transparent pixels show white, as in transformers' CLIP preprocessing. 16-bit grey is scaled to 8 bits;
    32-bit integers count as 16-bit grey, floats as grey from 0 to 1. Colour profiles and text are not read.

    Args:
        path: the file; its content decides the format, not its name.
        max_pixels: width times height above which nothing is decoded.

    Raises:
        RequestError: no such file, not one of these formats, broken, cut short, too large, or pixel values
            without a defined white.
    """
    try:
        check_file(path)
        with path.open("rb") as file:
            return _read(file, path, max_pixels)
    except OSError as error:
        raise RequestError(f"image {path}: {error.strerror or 'cannot be read'}") from error


def check_file(path: Path, what: str = "image") -> None:
    """Refuse folders, devices and pipes, empty and huge files before opening them.

    Raises:
        RequestError: it is one.
        OSError: there is no such file, or it may not be looked at.
    """
    try:
        status = path.stat()
    except ValueError as error:  # a NUL in the name
        raise RequestError(f"{what} {str(path)!r}: not a file name") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a file"
        raise RequestError(f"{what} {path}: {kind}; name a file")
    if status.st_size == 0:
        raise RequestError(f"{what} {path}: the file is empty")
    if status.st_size > _MAX_FILE_BYTES:
        raise RequestError(
            f"{what} {path}: {status.st_size} bytes, at most {_MAX_FILE_BYTES} are read; use a smaller one"
        )


def _read(file: BinaryIO, path: Path, max_pixels: int) -> Image.Image:
    """`read_image` on an open file."""
    broken = RequestError(f"image {path}: broken or cut short; save it again as PNG or JPEG")
    try:
        source = _without_metadata(file)
    except ValueError as error:
        raise broken from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on the file; we have our own limits and messages
        # Decoders meet broken files with almost any exception (SyntaxError, struct.error, KeyError, ...).
        try:
            image: Image.Image = Image.open(source, formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise _too_large(path, "far too many pixels", max_pixels) from error
        except UnidentifiedImageError as error:
            raise RequestError(f"image {path}: not a picture in one of the formats {', '.join(_FORMATS)}") from error
        except Exception as error:
            raise broken from error
        with image:
            if image.width * image.height > max_pixels:
                raise _too_large(path, f"{image.width} x {image.height} pixels", max_pixels)
            try:
                image.load()
                upright = _upright(image)
            except Exception as error:
                raise broken from error
            return _to_rgb(upright, f"image {path}")


def _without_metadata(file: BinaryIO) -> BinaryIO:
    """The picture alone where text, profiles or EXIF of any size could stall the decoder, else the file itself."""
    start = file.read(len(png_chunks.SIGNATURE))
    if start == png_chunks.SIGNATURE:
        return png_chunks.without_metadata(file)
    if start.startswith(jpeg_segments.START):
        return jpeg_segments.without_metadata(file)
    file.seek(0)
    return file


def _too_large(path: Path, got: str, max_pixels: int) -> RequestError:
    return RequestError(
        f"image {path}: {got}, at most {max_pixels / 1e6:g} megapixels are decoded; scale it down first"
    )


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; unreadable EXIF counts as none."""
    if len(image.info.get("exif", b"")) > _MAX_EXIF_BYTES:
        return image
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # as above: broken EXIF raises anything, and the picture itself is fine
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    if method is None:
        return image
    upright = image.transpose(method)
    upright.info = dict(image.info)
    return upright


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """8-bit RGB; transparency over white."""
    if image.mode.startswith(("I", "F")):
        return _grey(np.asarray(image), name).convert("RGB")
    try:
        if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except ValueError as error:
        raise RequestError(f"{name}: colours stored as {image.mode}; save it again as RGB") from error


def _grey(pixels: NDArray[Any], name: str) -> Image.Image:
    """16-bit, 32-bit or float grey as 8-bit grey. Pillow's own conversion clips instead of scaling."""
    white = 1.0 if pixels.dtype.kind == "f" else 65_535
    darkest, brightest = pixels.min(), pixels.max()
    if not (darkest >= 0 and brightest <= white):  # also true for NaN
        raise RequestError(
            f"{name}: grey values from {darkest:g} to {brightest:g}, expected 0 to {white:g}; save it as 8-bit"
        )
    return Image.fromarray(np.rint(pixels * np.float32(255 / white)).astype(np.uint8))
