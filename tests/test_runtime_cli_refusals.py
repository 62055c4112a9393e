"""Pictures, options and bundles that `ipa-run` cannot use: exit code 2 and one message."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from build_calls import change_graph
from commands import Run, refused
from PIL import Image

SMALL = ["--steps", "2", "--height", "64", "--width", "64"]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "I;16", "L", "1", "LA"])
def test_every_kind_of_image_is_read(ipa_run: Run, tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.tiff"
    if mode == "I;16":
        Image.fromarray(np.full((30, 20), 40000, np.uint16)).save(path)
    else:
        Image.new("RGB", (20, 30), "teal").convert(mode).save(path)
    assert ipa_run("--image", path, *SMALL, "--output", tmp_path / "x.png")[0] == 0


def test_a_1x1_image_and_an_animated_gif_are_read(ipa_run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    assert ipa_run("--image", tmp_path / "dot.png", *SMALL, "--output", tmp_path / "x.png")[0] == 0
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.gif")
    for name in ("two", "red"):
        ipa_run("--image", tmp_path / f"{name}.gif", *SMALL, "--seed", 1, "--output", tmp_path / f"{name}.png")
    np.testing.assert_array_equal(pixels(tmp_path / "two.png"), pixels(tmp_path / "red.png"))


def broken_png(folder: Path) -> Path:
    path = folder / "broken.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    return path


def bomb(folder: Path) -> Path:
    path = folder / "bomb.png"
    Image.new("1", (13000, 13000)).save(path)
    return path


def postscript(folder: Path) -> Path:
    path = folder / "eps.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    return path


def empty(folder: Path) -> Path:
    path = folder / "empty.png"
    path.touch()
    return path


@pytest.mark.parametrize("make", [lambda folder: folder / "none.png", broken_png, bomb, postscript, empty, lambda f: f])
def test_images_that_cannot_be_read(ipa_run: Run, tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    assert str(path) in refused(ipa_run("--image", path, "--prompt", "a cat", *SMALL, "--output", tmp_path / "x.png"))
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 0], "num_inference_steps (--steps) is 0, expected a whole number from 1 to 1000"),
        (["--steps", 1001], "expected a whole number from 1 to 1000"),
        (["--steps", "many"], "'many' is not a valid integer"),
        (["--ip-adapter-scale", "nan"], "ip_adapter_scale is nan, expected a finite number"),
        (["--guidance-scale", "inf"], "guidance_scale is inf, expected a finite number"),
        (["--height", 100], "height is 100, expected a multiple of 8: try 96 or 104"),
        (["--width", 0], "width is 0, expected a whole number from 64"),
        (["--seed", -1], "seed is -1"),
        (["--seed", 2**64], f"seed is {2**64}"),
        (["--num-images", 0], "num_images is 0"),
        (["--scheduler", "karras"], "unknown scheduler 'karras', expected one of ddim, pndm, euler, "),
        (["--eta", 2], "eta is 2.0, expected 0 to 1"),
        (["--eta", 0.5, "--scheduler", "pndm"], "--eta is 0.5, but PNDM has no such option: leave it out, or use --sc"),
        (["--steps", 51, "--scheduler", "lcm"], "--steps is 51, expected a whole number from 1 to 50, the scheduler's"),
        (["--engine", "warp"], "unknown engine 'warp', expected one of auto, tensorrt, tensorrt-rtx, "),
        (["--adapter", "nobody"], "has no adapter 'nobody'"),
        (["--output", "nowhere/deep/x.png"], "there is no folder"),
        (["--output", "x.jpg"], "x.png"),
        (["--colour", "red"], "No such option"),
        (["--from", "none.png"], "none.png"),
        (["--bundle", "nowhere"], "bundle nowhere is not a folder"),
    ],
)
def test_bad_options(ipa_run: Run, reference: Path, arguments: list[object], message: str) -> None:
    assert message in refused(ipa_run("--image", reference, "--prompt", "a cat", *SMALL, *arguments))


@pytest.fixture
def copied_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def test_a_changed_byte_of_the_weights(ipa_run: Run, copied_bundle: Path, tmp_path: Path) -> None:
    weights = copied_bundle / "unet" / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert f"{weights} is damaged" in refused(ipa_run("--prompt", "a cat", bundle=copied_bundle))


def test_an_incomplete_bundle(ipa_run: Run, copied_bundle: Path) -> None:
    (copied_bundle / "vae_decoder" / "model.onnx").unlink()
    assert "is missing; the bundle is incomplete" in refused(ipa_run("--prompt", "a cat", bundle=copied_bundle))


def test_a_bundle_of_a_newer_format(ipa_run: Run, copied_bundle: Path) -> None:
    manifest = copied_bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 9'))
    assert "pip install -U ipa-runtime" in refused(ipa_run("--prompt", "a cat", bundle=copied_bundle))


def test_an_adapter_whose_negative_is_made_in_an_unknown_way(
    ipa_run: Run, copied_bundle: Path, reference: Path
) -> None:
    manifest = copied_bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"negative": "zeros"', '"negative": "encoded zeros"'))
    message = refused(ipa_run("--image", reference, "--prompt", "a cat", *SMALL, bundle=copied_bundle))
    assert "negative tokens by 'encoded zeros'" in message


def test_a_folder_that_cannot_be_written(ipa_run: Run, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("in the way")
    assert "output" in refused(ipa_run("--prompt", "a cat", *SMALL, "--output", target / "x.png"))
    assert "not a folder" in refused(ipa_run("--prompt", "a cat", *SMALL, "--output", target))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_picture_of_one_value_is_no_result(ipa_run: Run, tiny_bundle: Path, tmp_path: Path, engine: str) -> None:
    def blacken(model: onnx.ModelProto) -> None:
        graph = model.graph
        for node in graph.node:
            node.output[:] = ["colourful" if name == "image" else name for name in node.output]
        graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((), np.float32), "zero"))
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(-1, np.float32), "black"))
        graph.node.append(onnx.helper.make_node("Mul", ["colourful", "zero"], ["nothing"]))
        graph.node.append(onnx.helper.make_node("Add", ["nothing", "black"], ["image"]))

    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    change_graph(bundle, "vae_decoder", blacken)
    output = tmp_path / "x.png"
    message = refused(ipa_run("--bundle", bundle, "--engine", engine, "--prompt", "a cat", *SMALL, "--output", output))
    assert "vae_decoder: every value of the picture is -1, so an engine is broken" in message
    assert not output.exists()
