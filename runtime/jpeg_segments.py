"""The segments in front of a JPEG's picture, walked without decoding anything.

Source: ITU-T T.81, annex B.
"""

from __future__ import annotations

import io
from typing import BinaryIO

START = b"\xff\xd8"

_APP0, _APP1, _APP14, _APP15, _COMMENT, _START_OF_SCAN = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE, 0xDA
_EXIF = b"Exif\0\0"


def without_metadata(file: BinaryIO) -> io.BytesIO:
    """The same JPEG with nothing but the picture, its colour coding (APP14) and the first EXIF segment.

    Pillow joins segments of one kind in quadratic time: 50 MB of them keep it busy for 20 seconds.
    Bytes that are no segment end the walk, and are left for the decoder to judge.
    """
    picture = io.BytesIO()
    picture.write(START)
    has_exif = False
    file.seek(len(START))
    while True:
        header = file.read(4)
        if len(header) < 4 or header[0] != 0xFF or header[1] in (0xFF, _START_OF_SCAN):
            break
        marker, size = header[1], int.from_bytes(header[2:], "big")
        data = file.read(max(size - 2, 0))
        is_exif = marker == _APP1 and data.startswith(_EXIF) and not has_exif
        has_exif |= is_exif
        is_metadata = _APP0 <= marker <= _APP15 or marker == _COMMENT
        if not is_metadata or is_exif or marker == _APP14:
            picture.write(header + data)
    picture.write(header + file.read())
    picture.seek(0)
    return picture
