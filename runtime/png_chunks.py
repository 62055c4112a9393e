"""The chunks of a PNG file, walked without decoding anything.

Source: https://www.w3.org/TR/png-3/, section 5.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"

# 32 megapixels of 16-bit RGBA in libpng's pieces of 8 KiB are about 32,000 chunks.
_MAX_CHUNKS = 100_000
# A camera's EXIF block fits one JPEG segment of 64 KiB.
_MAX_EXIF_BYTES = 65_536
_PICTURE_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_CHECKSUM_BYTES = 4


class Chunk(NamedTuple):
    """One chunk: its four-letter kind, and where its data lies in the file."""

    kind: bytes
    offset: int
    size: int


def chunks(file: BinaryIO) -> Iterator[Chunk]:
    """Every chunk of `file` up to its end; data is skipped, not read.

    Raises:
        ValueError: not a PNG file, cut short within a chunk, or more chunks than any real picture has.
    """
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    if file.read(len(SIGNATURE)) != SIGNATURE:
        raise ValueError("not a PNG file")
    position = len(SIGNATURE)
    for _ in range(_MAX_CHUNKS):
        file.seek(position)
        header = file.read(8)
        if not header:
            return
        if len(header) < 8:
            raise ValueError("cut short")
        size, kind = struct.unpack(">I4s", header)
        chunk = Chunk(kind, position + 8, size)
        position = chunk.offset + size + _CHECKSUM_BYTES
        if position > end:
            raise ValueError("cut short")
        yield chunk
        if kind == b"IEND":
            return
    raise ValueError(f"more than {_MAX_CHUNKS} chunks")


def read_data(file: BinaryIO, chunk: Chunk) -> bytes:
    """The chunk's data, without the checksum."""
    file.seek(chunk.offset)
    return file.read(chunk.size)


def without_metadata(file: BinaryIO) -> io.BytesIO:
    """The same PNG with nothing but the picture and a small EXIF block; animations keep their still image.

    Decoders read text, colour profiles and EXIF blocks of any size before they give up on them.

    Raises:
        ValueError: see `chunks`.
    """
    picture = io.BytesIO()
    picture.write(SIGNATURE)
    for chunk in chunks(file):
        if chunk.kind in _PICTURE_CHUNKS or (chunk.kind == b"eXIf" and chunk.size <= _MAX_EXIF_BYTES):
            file.seek(chunk.offset - 8)
            picture.write(file.read(8 + chunk.size + _CHECKSUM_BYTES))
    picture.seek(0)
    return picture
