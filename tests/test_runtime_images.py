"""Pictures of every format and mode read as diffusers reads them."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import numpy as np
import pytest
from picture_files import encoded, random_picture, refused
from PIL import Image, ImageOps

from ipa.engines.errors import RequestError
from ipa.runtime.images import read_image
from ipa.runtime.masks import check_ratio


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *[(kind, mode) for kind in ("PNG", "GIF", "BMP", "TIFF") for mode in ("RGB", "L", "1", "P")],
        *[("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("TIFF", "CMYK"), ("WEBP", "RGB"), ("WEBP", "L")],
    ],
)
def test_formats_and_modes_read_as_diffusers_load_image(tmp_path: Path, kind: str, mode: str) -> None:
    image = random_picture(31, 17).convert(mode)
    path = tmp_path / "picture.bin"  # the content decides, not the name
    path.write_bytes(encoded(image, kind))
    with Image.open(path) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    result = read_image(path)
    assert result.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "rotated"
    path.write_bytes(encoded(random_picture(40, 24), kind, exif=exif))
    with Image.open(path) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    result = read_image(path)
    assert result.size == ((24, 40) if orientation in (5, 6, 7, 8) else (40, 24))
    np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))


def test_broken_exif_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded(random_picture(40, 24), "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff\x01\x12garbage"))
    assert read_image(path).size == (40, 24)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA-palette"])
def test_transparency_shows_white(tmp_path: Path, mode: str) -> None:
    """Colours under full transparency are arbitrary (here green): white stands for them, as in transformers."""
    transformers = pytest.importorskip("transformers.image_transforms")
    image = Image.new("RGBA", (8, 8), (0, 255, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 8))
    image.paste((0, 0, 255, 128), (0, 0, 2, 8))
    stored = image.quantize(8) if mode == "PA-palette" else image.convert(mode)
    path = tmp_path / "x.png"
    stored.save(path)
    result = np.asarray(read_image(path))
    assert (result[:, 4:] == 255).all() and (result[:, :4] != 255).any()
    with Image.open(path) as opened:
        np.testing.assert_array_equal(result, transformers.convert_to_rgb(opened, return_numpy=True))


def test_grey_of_16_bits_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    for name in ("x.png", "x.tiff"):
        Image.fromarray(values).save(tmp_path / name)
        result = np.asarray(read_image(tmp_path / name))
        np.testing.assert_array_equal(result[..., 0], np.rint(values / 257))
        assert (result[..., 0] == result[..., 2]).all()


def test_float_and_32_bit_grey_are_defined(tmp_path: Path) -> None:
    path = tmp_path / "x.tiff"
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(path)
    np.testing.assert_array_equal(np.asarray(read_image(path))[0, :, 1], [0, 128, 255])
    Image.fromarray(np.array([[0, 257, 65535]], np.int32)).save(path)
    np.testing.assert_array_equal(np.asarray(read_image(path))[0, :, 1], [0, 1, 255])
    for bad in (np.array([[0.0, 255.0]], np.float32), np.array([[np.nan]], np.float32), np.array([[-1]], np.int32)):
        Image.fromarray(bad).save(path)
        refused(path, "grey values from")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_animation_gives_the_first_frame(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / "animation"
    path.write_bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert np.asarray(read_image(path)).reshape(-1, 3).tolist() == [[255, 0, 0]] * 256


def test_frames_are_not_counted(tmp_path: Path) -> None:
    """200,000 frames take no longer than one."""
    one = encoded(Image.new("P", (4, 4)), "GIF")
    body = one[: one.rindex(b"\x3b")]
    frame = body[body.index(b"\x2c", 13) :]  # from the image descriptor to the end
    path = tmp_path / "x.gif"
    path.write_bytes(body + frame * 200_000 + b"\x3b")
    # A TIFF whose directories form a chain of 50,000.
    tiff = bytearray(b"II*\0" + struct.pack("<I", 12) + b"\x7f\0\0\0")
    tags = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 1)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    for _ in range(50_000):
        directory = struct.pack("<H", len(tags)) + entries
        tiff += directory + struct.pack("<I", len(tiff) + len(directory) + 4)
    (tmp_path / "x.tiff").write_bytes(bytes(tiff[:-4]) + b"\0\0\0\0")
    for name in ("x.gif", "x.tiff"):
        start = time.process_time()
        read_image(tmp_path / name)
        assert time.process_time() - start < 1.0, name


def test_a_mask_may_miss_what_a_photo_s_size_is_rounded_by() -> None:
    """An image prompt's mask of a photo that is 1000x667, for the picture of 1000x664 that is made of it."""
    check_ratio("mask_image", Image.new("L", (1000, 667)), (1000, 664), slack=8)
    check_ratio("mask_image", Image.new("L", (500, 333)), (1000, 667))
    for mask, slack in (((1000, 667), 1), ((1000, 640), 8)):
        with pytest.raises(RequestError, match=r"^mask_image is .*, the picture 1000x664: crop the mask"):
            check_ratio("mask_image", Image.new("L", mask), (1000, 664), slack)
