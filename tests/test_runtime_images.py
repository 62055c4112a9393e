"""Reading pictures that nobody vouches for; CLIP preprocessing and the VAE's output against their oracles."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from ipa.engines.errors import RequestError
from ipa.engines.manifest import ImageProcessorRecord
from ipa.runtime.images import MAX_ASPECT_RATIO, open_image, preprocess, read_image, to_images

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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


# --- what is read ---------------------------------------------------------------------------------


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


# --- what is refused ------------------------------------------------------------------------------


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


# --- metadata is not trusted ----------------------------------------------------------------------

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


# --- preprocessing --------------------------------------------------------------------------------

SIZES = [
    *[(224, 224), (1, 1), (2, 1), (3, 7), (5, 500), (223, 224), (225, 224), (226, 225), (640, 480), (480, 641)],
    *[(333, 1001), (100, 1), (1, 100), (448, 449), (31, 30), (1024, 768), (299, 300)],
]


@pytest.mark.parametrize("edge", [224, 32, 33])
def test_preprocess_equals_transformers_bit_for_bit(edge: int) -> None:
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    oracle = module.CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})
    processor = ImageProcessorRecord(edge, CLIP_MEAN, CLIP_STD)
    for seed, size in enumerate(SIZES):
        image = random_picture(*size, seed)
        expected = np.stack(oracle(image)["pixel_values"])
        result = preprocess([image], processor)
        assert result.dtype == np.float32 and result.shape == (1, 3, edge, edge)
        np.testing.assert_array_equal(result, expected, err_msg=str(size))


def test_preprocess_stacks_images_in_order() -> None:
    processor = ImageProcessorRecord(32, CLIP_MEAN, CLIP_STD)
    images = [random_picture(40, 50, 1), random_picture(60, 33, 2)]
    both = preprocess(images, processor)
    np.testing.assert_array_equal(both, np.concatenate([preprocess([image], processor) for image in images]))


def test_preprocess_refuses_extreme_aspect_ratios() -> None:
    processor = ImageProcessorRecord(32, CLIP_MEAN, CLIP_STD)
    assert preprocess([Image.new("RGB", (1, MAX_ASPECT_RATIO))], processor).shape == (1, 3, 32, 32)
    for size in ((1, 10_000), (10_000, 1), (1, MAX_ASPECT_RATIO + 1)):
        with pytest.raises(RequestError, match=f"{size[0]} x {size[1]} pixels"):
            preprocess([Image.new("RGB", size)], processor)


# --- the VAE's output -----------------------------------------------------------------------------


def test_to_images_equals_diffusers_byte_for_byte() -> None:
    torch = pytest.importorskip("torch")
    from diffusers.image_processor import VaeImageProcessor

    rng = np.random.default_rng(0)
    array = rng.normal(0, 0.8, (2, 3, 24, 40)).astype(np.float32)
    # Every multiple of half a step, where rounding and clipping decide.
    edges = (np.arange(-20, 531, dtype=np.float32) / 510 * 2 - 1).astype(np.float32)
    array.reshape(-1)[: edges.size] = edges
    expected = VaeImageProcessor().postprocess(torch.from_numpy(array), output_type="pil")
    result = to_images(array)
    assert [image.size for image in result] == [(40, 24)] * 2
    for ours, theirs in zip(result, expected, strict=True):
        assert ours.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
