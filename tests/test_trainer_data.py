"""Data files, paths, images and their preprocessing."""

from __future__ import annotations

import io
import json
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ipa.trainer.broken import BrokenImage, BrokenImages
from ipa.trainer.data import Record, read_records
from ipa.trainer.errors import TrainError
from ipa.trainer.images import ImageError, open_image, square_pixels


def texts(records: list[Record]) -> list[tuple[str, str]]:
    return [(record.image.name, record.text) for record in records]


def test_json_and_jsonl_agree(tmp_path: Path) -> None:
    entries = [
        {"image_file": "a.png", "text": "a cat"},
        {"image_file": "sub/b.png", "text": "line\u2028separator", "reference_file": "c.png"},
        {"image_file": "a.png", "text": "", "reference_file": None},
    ]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    (tmp_path / "data.jsonl").write_text("\n\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries))
    records = read_records(tmp_path / "data.json", tmp_path)
    assert records == read_records(tmp_path / "data.jsonl", tmp_path)
    assert [record.reference.name for record in records] == ["a.png", "c.png", "a.png"]
    assert records[1].image == tmp_path / "sub" / "b.png"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("a.png,plain", "plain"),
        ('a.png,"quoted, with comma"', "quoted, with comma"),
        ('a.png,"a ""big"" cat"', 'a "big" cat'),
        ('a.png,"two\nlines"', "two\nlines"),
        ("a.png,unquoted, with commas, many", "unquoted, with commas, many"),
        ('a.png,"Hello" he said, waving', '"Hello" he said, waving'),
        ('a.png,a "quoted" word', 'a "quoted" word'),
        ("a.png,", ""),
        ("a.png,it's", "it's"),
    ],
)
def test_csv_forms(tmp_path: Path, row: str, text: str) -> None:
    data = tmp_path / "data.csv"
    data.write_text(f"dir,text\n{row}\nb.png,next, one\n\nc.png,last\n")
    assert texts(read_records(data, tmp_path)) == [("a.png", text), ("b.png", "next, one"), ("c.png", "last")]


def test_csv_with_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_bytes(b"\xef\xbb\xbfdir,text\r\na.png,one, two\r\nb.png,three\r\n")
    assert texts(read_records(data, tmp_path)) == [("a.png", "one, two"), ("b.png", "three")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", "{", "is not JSON"),
        ("d.json", "{}", "expected a JSON list"),
        ("d.json", "[]", "holds no records"),
        ("d.json", "[3]", "record 1: expected an object"),
        ("d.json", '[{"image_file": "a.png"}]', "expected 'text' to be a string"),
        ("d.json", '[{"image_file": "a.png", "text": null}]', "found NoneType"),
        ("d.json", '[{"image_file": "a.png", "text": "", "reference_file": 3}]', "'reference_file'"),
        ("d.jsonl", '{"image_file": "a.png", "text": ""}\n{', "line 2 is not JSON"),
        ("d.csv", "file,caption\na,b\n", "expected the header 'dir,text'"),
        ("d.csv", 'dir,text\na.png,"never closed\nb.png,x\n', "line 2: expected 'dir,text' with balanced quotes"),
        ("d.csv", "dir,text\nno comma\n", "line 2"),
        ("d.txt", "", "expected a .json, .jsonl or .csv"),
        ("d.json", "[" * 100_000, "is not JSON"),
    ],
)
def test_malformed_data_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TrainError, match=message):
        read_records(tmp_path / name, tmp_path)


def test_unreadable_data_files(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="cannot be read"):
        read_records(tmp_path / "none.json", tmp_path)
    (tmp_path / "latin.json").write_bytes(b"\xe4\xff")
    with pytest.raises(TrainError, match="not UTF-8"):
        read_records(tmp_path / "latin.json", tmp_path)
    with pytest.raises(TrainError, match="not a folder"):
        read_records(tmp_path / "latin.json", tmp_path / "missing")


@pytest.mark.parametrize(
    "path", ["../a.png", "/etc/passwd", "x/../../a.png", "C:\\a.png", "\\\\host\\a.png", "", "a\0.png"]
)
@pytest.mark.parametrize("key", ["image_file", "reference_file"])
def test_paths_that_leave_the_root_are_refused(tmp_path: Path, path: str, key: str) -> None:
    entry = {"image_file": "a.png", "text": "x"} | {key: path}
    (tmp_path / "d.json").write_text(json.dumps([entry]))
    with pytest.raises(TrainError, match="is not a relative path below --image-root"):
        read_records(tmp_path / "d.json", tmp_path)


def png_header(width: int, height: int) -> bytes:
    """A PNG of any claimed size with next to no data: the cheap decompression bomb."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GREY = 153  # in the web palette, so that no mode has to approximate it
RED = Image.new("RGB", (64, 48), (250, 10, 10))


def long_text_png() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 80_000_000, zip=True)
    return encoded(RED, pnginfo=info)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: b"", "empty"),
        (lambda: b"not an image at all", "not a JPEG"),
        (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "not a JPEG"),
        (lambda: b"%PDF-1.4\n", "not a JPEG"),
        (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a JPEG"),
        (lambda: encoded(RED)[:-60], "cannot be decoded"),
        (lambda: encoded(RED, "JPEG")[:400], "cannot be decoded"),
        (lambda: png_header(13000, 13000), "32 megapixels"),
        (lambda: png_header(9000, 9000), "9000 x 9000 pixels"),
        (lambda: png_header(40000, 40000), "32 megapixels"),
        (lambda: encoded(Image.new("RGB", (1, 1))), "at least 16"),
        (lambda: encoded(Image.new("RGB", (20, 2000))), "longer than 20 to 1"),
        (long_text_png, "cannot be decoded"),
    ],
)
def test_unusable_images_are_named_with_our_own_reason(
    tmp_path: Path, content: Callable[[], bytes], reason: str, recwarn: pytest.WarningsRecorder
) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(content())
    started = time.monotonic()
    with pytest.raises(ImageError, match=reason) as caught:
        open_image(file)
    assert time.monotonic() - started < 2
    assert "0x" not in str(caught.value) and str(file) not in str(caught.value)
    assert not recwarn.list


def test_missing_image(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="missing"):
        open_image(tmp_path / "none.png")


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "I", "RGB"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    kind = "TIFF" if mode in ("CMYK", "I") else "PNG"
    if mode in ("I;16", "I"):
        array = np.full((32, 32), GREY * 256, dtype=np.uint16 if mode == "I;16" else np.int32)
        image = Image.fromarray(array)
    else:
        image = Image.new("RGB", (32, 32), (GREY, GREY, GREY)).convert(mode)
    (tmp_path / "x").write_bytes(encoded(image, kind))
    opened = open_image(tmp_path / "x")
    assert opened.mode == "RGB"
    if mode != "1":  # one bit is dithered
        assert abs(int(np.asarray(opened)[5, 5, 0]) - GREY) <= 1  # CMYK rounds


def test_rotated_photos_are_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    (tmp_path / "x.jpg").write_bytes(encoded(RED, "JPEG", exif=exif))
    assert open_image(tmp_path / "x.jpg").size == (48, 64)


def test_first_frame_only(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), (shade, 0, 0)) for shade in (200, 100, 50)]
    (tmp_path / "x.gif").write_bytes(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert np.asarray(open_image(tmp_path / "x.gif"))[0, 0, 0] == 200


def test_square_pixels_is_the_centre() -> None:
    """Against a plain crop where nothing is resized, and against resize-then-crop inside the picture."""
    array = np.random.default_rng(0).integers(0, 256, (32, 50, 3), dtype=np.uint8)
    pixels = square_pixels(Image.fromarray(array), 32)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == np.float32
    expected = array[:, 9:41].transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(pixels, expected, atol=1e-6)

    wide = Image.fromarray(array[:, 1:49])
    smaller = square_pixels(wide, 16)
    resized = wide.resize((24, 16), Image.Resampling.BILINEAR).crop((4, 0, 20, 16))
    expected = np.asarray(resized, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
    # One level of rounding apart; the outermost columns differ, resize-then-crop looks beyond the crop there.
    np.testing.assert_allclose(smaller[..., 1:-1], expected[..., 1:-1], atol=1.1 / 127.5)


def test_broken_images_are_reported_once_and_too_many_are_an_error(tmp_path: Path) -> None:
    messages: list[str] = []
    broken = BrokenImages(100, messages.append)
    for index in range(9):
        broken.add(BrokenImage(index, tmp_path / "shared.png", "the file is missing"))
        broken.add(BrokenImage(index, tmp_path / "shared.png", "the file is missing"))
        broken.check()
    assert messages == [f"skipped {tmp_path / 'shared.png'}: the file is missing"]
    for index in range(10, 20):
        broken.add_usable(index)
    broken.check()  # 9 of 19
    assert broken.count == 9
    for index in range(20, 23):
        broken.add(BrokenImage(index, tmp_path / f"{index}.png", "damaged"))
    with pytest.raises(TrainError, match="12 of the 22 records"):
        broken.check()
