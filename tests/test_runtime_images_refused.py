"""Reading pictures that nobody vouches for: refused with our message, or read without what is around them."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from picture_files import encoded, png_chunk, random_picture, refused, with_chunks
from PIL import Image, PngImagePlugin

from ipa.engines.errors import RequestError
from ipa.runtime.images import open_image, read_image


def png_bomb(width: int, height: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(bytes((width + 7) // 8 + 1) * height, 9))
    return b"\x89PNG\r\n\x1a\n" + header + data + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("edge", [9_000, 13_000, 20_000])
def test_decompression_bomb_is_refused_from_the_header(
    tmp_path: Path, edge: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_bomb(edge, edge))
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda _: pytest.fail("decoded"))
    assert "at most 32 megapixels" in refused(path)
    assert not recwarn.list


def test_max_pixels_is_a_limit_not_a_guess(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    random_picture(20, 10).save(path)
    assert read_image(path, max_pixels=200).size == (20, 10)
    with pytest.raises(RequestError, match="20 x 10 pixels"):
        read_image(path, max_pixels=199)


@pytest.mark.parametrize(
    "content",
    [
        b"hello, I am a text file\n" * 10,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\1\0\0\0\1\0\x08\0\3" + bytes(40),
        b"%PDF-1.7\n1 0 obj\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\0",
        bytes(1000),
    ],
    ids=["text", "eps", "psd", "pdf", "svg", "one byte", "zeros"],
)
def test_other_formats_under_the_name_png_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    refused(path, "not a picture in one of the formats PNG, JPEG")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_files_cut_short_are_refused(tmp_path: Path, kind: str) -> None:
    content = encoded(random_picture(64, 64), kind)
    path = tmp_path / "cut"
    for share in (0.01, 0.1, 0.5, 0.9):
        path.write_bytes(content[: max(1, int(len(content) * share))])
        refused(path)


def test_flipped_bytes_end_in_a_picture_or_in_our_message(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "flipped"
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        content = encoded(random_picture(24, 24), kind)
        for _ in range(40):
            damaged = bytearray(content)
            for position in rng.integers(0, min(len(content), 400), 3):
                damaged[position] = rng.integers(0, 256)
            path.write_bytes(bytes(damaged))
            try:
                assert read_image(path).mode == "RGB"
            except RequestError as error:
                assert str(path) in str(error)


def test_pillows_own_remarks_stay_out_of_stderr(tmp_path: Path) -> None:
    """Pillow logs an error for a TIFF with 9 samples per pixel; pytest's log capture would hide it, so: a process."""
    path = tmp_path / "x.tiff"
    content = bytearray(encoded(random_picture(8, 8), "TIFF"))
    tag = content.index(struct.pack("<HHI", 277, 3, 1))
    content[tag + 8] = 9
    path.write_bytes(bytes(content))
    refused(path)
    code = (
        "import sys; from pathlib import Path; from ipa.runtime.images import read_image\n"
        "try: read_image(Path(sys.argv[1]))\nexcept Exception as error: print(type(error).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("RequestError\n", "")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "missing.png", "No such file")
    refused(tmp_path, "a folder")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", "empty")
    refused(Path("/dev/zero"), "not a file")
    with pytest.raises(RequestError, match="not a file name"):
        read_image(tmp_path / "nul\0.png")


def test_no_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    random_picture(4, 4).save(path)

    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    refused(path, "Permission denied")


MIB = 1024**2


def compressed_text(kind: bytes, size: int) -> bytes:
    return png_chunk(kind, b"name\0\0" + zlib.compress(bytes(size)))


@pytest.mark.parametrize(
    "extra",
    [
        [png_chunk(b"tEXt", b"Comment\0" + b"x" * (50 * MIB))],
        [png_chunk(b"tEXt", b"c\0" + b"x" * MIB)] * 100,
        [compressed_text(b"zTXt", 50 * MIB)],
        [compressed_text(b"iCCP", 50 * MIB)],
        [png_chunk(b"eXIf", b"MM\0\x2a\0\0\0\x08" + bytes(50 * MIB))],
        [png_chunk(b"eXIf", b"MM\0\x2a" + b"\xff" * 4000)],
        [png_chunk(b"tEXt", b"k%d\0" % i) for i in range(20_000)],
    ],
    ids=["50 MB text", "100 MB of texts", "text bomb", "profile bomb", "50 MB exif", "bad exif", "20,000 texts"],
)
def test_png_with_monstrous_metadata_is_read_within_2_seconds(tmp_path: Path, extra: list[bytes]) -> None:
    image = random_picture(64, 48)
    path = tmp_path / "x.png"
    path.write_bytes(with_chunks(encoded(image, "PNG"), *extra))
    start = time.process_time()
    result = read_image(path)
    assert time.process_time() - start < 2.0
    np.testing.assert_array_equal(np.asarray(result), np.asarray(image))


@pytest.mark.parametrize("marker", [0xE1, 0xE2, 0xFE])
def test_jpeg_with_50_mb_of_metadata_is_read_within_2_seconds(tmp_path: Path, marker: int) -> None:
    prefix = {0xE1: b"Exif\0\0", 0xE2: b"ICC_PROFILE\0\1\1", 0xFE: b""}[marker]
    data = prefix + b"x" * (65_533 - len(prefix))
    jpeg = encoded(random_picture(64, 48), "JPEG")
    path = tmp_path / "x.jpg"
    path.write_bytes(jpeg[:2] + (bytes([0xFF, marker]) + struct.pack(">H", 65_535) + data) * 800 + jpeg[2:])
    start = time.process_time()
    assert read_image(path).size == (64, 48)
    assert time.process_time() - start < 2.0


def test_other_formats_with_50_mb_of_metadata_are_read_within_2_seconds(tmp_path: Path) -> None:
    image = random_picture(64, 48)
    gif = encoded(image, "GIF")
    table_end = 13 + 3 * 2 ** ((gif[10] & 7) + 1)
    comment = b"\x21\xfe" + (b"\xff" + b"x" * 255) * 200_000 + b"\0"
    contents = {
        "gif": gif[:table_end] + comment + gif[table_end:],
        "webp": encoded(image, "WEBP", exif=b"Exif\0\0MM\0\x2a" + bytes(50 * MIB), icc_profile=bytes(20 * MIB)),
        "tiff": encoded(image, "TIFF", icc_profile=bytes(50 * MIB)),
    }
    for name, content in contents.items():
        path = tmp_path / f"x.{name}"
        path.write_bytes(content)
        start = time.process_time()
        assert read_image(path).size == (64, 48)
        assert time.process_time() - start < 2.0, name


def test_open_image_takes_pictures_by_the_same_rules(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    random_picture(12, 8).convert("RGBA").save(path, exif=exif)
    from_file = read_image(path)
    assert from_file.size == (8, 12)
    with Image.open(path) as opened:
        for given in (opened, path, str(path)):
            np.testing.assert_array_equal(np.asarray(open_image(given)), np.asarray(from_file))
    with pytest.raises(RequestError, match="grey values from"):
        open_image(Image.fromarray(np.full((2, 2), np.inf, np.float32)))
