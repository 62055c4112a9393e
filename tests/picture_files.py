"""Picture files of every kind, for tests."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ipa.engines.errors import RequestError
from ipa.runtime.images import read_image


def random_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(png: bytes, *extra: bytes) -> bytes:
    """`png` with chunks inserted after IHDR."""
    return png[:33] + b"".join(extra) + png[33:]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def refused(path: Path, match: str | None = None) -> str:
    """The one-line message that reading `path` ends with."""
    with pytest.raises(RequestError, match=match) as caught:
        read_image(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message and " object at 0x" not in message and "BytesIO" not in message
    return message
