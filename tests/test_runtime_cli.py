"""`ipa-run` as its user meets it: the right picture, or exit code 2 and one message."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ipa.engines import registry
from ipa.engines.engine import GraphFile
from ipa.engines.registry import Backend
from ipa.runtime import Pipeline
from ipa.runtime.cli import SCHEDULERS, main
from ipa.runtime.schedulers import SCHEDULER_NAMES

SMALL = ["--steps", "2", "--height", "64", "--width", "64"]


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture
def ipa_run(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Call the command; returns exit code, standard output, standard error."""

    def call(*arguments: object, bundle: Path = tiny_bundle) -> tuple[int, str, str]:
        argv = ["ipa-run", *map(str, arguments)]
        if "--from" not in argv and "--bundle" not in argv:
            argv += ["--bundle", str(bundle)]
        if "--from" not in argv and "--engine" not in argv:
            argv += ["--engine", "onnxruntime"]  # the same bits everywhere; with --from the recorded one is taken
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.chdir(tmp_path)
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


Run = Callable[..., tuple[int, str, str]]


def refused(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert code == 2, (out, err)
    assert out == ""
    assert err.startswith("ipa-run: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_one_image_writes_exactly_that_file(ipa_run: Run, reference: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.png"
    code, out, err = ipa_run("--image", reference, "--prompt", "a cat", *SMALL, "--seed", 0, "--output", target)
    assert (code, out, err) == (0, f"{target}\n", "")
    assert Image.open(target).size == (64, 64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.png", "x.png"]


def test_several_images_into_a_folder_and_one_of_them_again(ipa_run: Run, reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    arguments = ["--image", reference, "--prompt", "a cat", *SMALL, "--seed", 0, "--num-images", 3]
    code, out, _ = ipa_run(*arguments, "--output", folder, "--format", "json")
    record = json.loads(out)
    assert code == 0
    assert len(record["images"]) == 3
    assert record["request"]["scheduler"] == "pndm"
    assert record["steps_per_second"] > 0
    second = Path(record["images"][1])
    code, _, err = ipa_run("--from", second, "--output", tmp_path / "again.png")
    assert (code, err) == (0, "")
    difference = np.abs(pixels(second).astype(int) - pixels(tmp_path / "again.png").astype(int))
    assert difference.max() <= 1  # alone instead of in a batch of three: another order of sums
    assert np.abs(pixels(second).astype(int) - pixels(Path(record["images"][0])).astype(int)).max() > 1


@pytest.mark.parametrize("scheduler", ["euler-ancestral", "dpm++-2m-karras"])
def test_the_scheduler_of_a_picture_makes_it_again(ipa_run: Run, tmp_path: Path, scheduler: str) -> None:
    """One that draws noise at each step, and one whose name says more than its class."""
    first, again = tmp_path / "x.png", tmp_path / "again.png"
    code, _, err = ipa_run("--prompt", "a cat", *SMALL, "--seed", 3, "--scheduler", scheduler, "--output", first)
    assert (code, err) == (0, "")
    code, _, err = ipa_run("--from", first, "--output", again)
    assert (code, err) == (0, "")
    np.testing.assert_array_equal(pixels(first), pixels(again))


def test_help_names_every_scheduler(ipa_run: Run) -> None:
    assert ", ".join(SCHEDULER_NAMES) == SCHEDULERS
    code, out, _ = ipa_run("--help")
    assert code == 0 and "".join(SCHEDULERS.split()) in "".join(out.split())  # a line may end at a hyphen


def test_from_takes_the_engine_that_made_the_picture(
    ipa_run: Run, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again, third = (tmp_path / f"{name}.png" for name in ("first", "again", "third"))
    ipa_run("--image", reference, "--prompt", "a cat", *SMALL, "--engine", "openvino", "--seed", 2, "--output", first)
    code, out, err = ipa_run("--from", first, "--output", again, "--format", "json")
    assert (code, err, json.loads(out)["engine"]) == (0, "", "openvino")
    np.testing.assert_array_equal(pixels(first), pixels(again))

    monkeypatch.setattr(Backend, "is_installed", property(lambda self: self.name == "onnxruntime"))
    code, out, err = ipa_run("--from", first, "--output", third, "--format", "json")
    assert (code, json.loads(out)["engine"]) == (0, "onnxruntime")
    assert "made with the engine 'openvino': the engine 'openvino' is not installed: run" in err


def test_from_is_as_lenient_as_auto_was(
    ipa_run: Run, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine of the base model cannot run the adapter, as where it was built for the one alone."""

    def obstacle(graphs: Sequence[GraphFile]) -> str:
        return "not built" if any(graph.component.startswith("ip_adapter/") for graph in graphs) else ""

    backends = [replace(one, obstacle=obstacle) if one.name == "openvino" else one for one in registry.BACKENDS]
    monkeypatch.setattr(registry, "BACKENDS", tuple(backends))
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    arguments = ["--image", reference, *SMALL, "--seed", 2, "--engine", "auto", "--format", "json", "--output", first]
    assert json.loads(ipa_run(*arguments)[1])["engine"] == "openvino"
    code, out, err = ipa_run("--from", first, "--output", again, "--format", "json")
    assert (code, err, json.loads(out)["engine"]) == (0, "", "openvino")
    np.testing.assert_array_equal(pixels(first), pixels(again))


def test_auto_says_which_engine_and_why(
    ipa_run: Run, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--image", reference, *SMALL, "--output", tmp_path / "x.png", "--format", "json", "--engine", "auto"]
    record = json.loads(ipa_run(*arguments)[1])
    assert record["engine"] == "openvino"
    assert "the fastest that runs here" in record["engine_reason"]
    monkeypatch.setattr(Backend, "is_installed", property(lambda self: self.name == "onnxruntime"))
    record = json.loads(ipa_run(*arguments)[1])
    assert record["engine"] == "onnxruntime"
    assert "faster: `pip install 'ipa-runtime[openvino]'`" in record["engine_reason"]
    monkeypatch.setattr(Backend, "is_installed", False)
    assert "no engine is installed: run `pip install 'ipa-runtime[onnxruntime]'`" in refused(ipa_run(*arguments))


def test_from_takes_overrides_and_notices_another_image(ipa_run: Run, reference: Path, tmp_path: Path) -> None:
    first, same, other = (tmp_path / f"{name}.png" for name in ("first", "same", "other"))
    ipa_run("--image", reference, "--prompt", 'a "cat", on: the\ngrass', *SMALL, "--seed", 5, "--output", first)
    assert ipa_run("--from", first, "--output", same)[0] == 0
    np.testing.assert_array_equal(pixels(first), pixels(same))
    assert first.read_bytes() == same.read_bytes()
    assert ipa_run("--from", first, "--seed", 6, "--output", other)[0] == 0
    assert (pixels(first) != pixels(other)).any()
    Image.new("RGB", (30, 30), "red").save(reference)
    code, _, err = ipa_run("--from", first, "--output", other)
    assert code == 0
    assert "is not the file that" in err


def test_no_metadata_leaves_none(ipa_run: Run, reference: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.png"
    ipa_run("--image", reference, "--prompt", "a cat", *SMALL, "--output", target, "--no-metadata")
    image = Image.open(target)
    image.load()
    assert image.info == {}
    assert "no request" in refused(ipa_run("--from", target))


def test_timings_print_every_stage(ipa_run: Run, reference: Path, tmp_path: Path) -> None:
    _, out, _ = ipa_run("--image", reference, *SMALL, "--output", tmp_path / "x.png", "--timings")
    for word in ("load", "text", "image", "denoise", "vae_decoder", "total", "3 UNet calls", "step/s"):
        assert word in out  # PNDM visits one timestep twice: 2 steps are 3 calls


@pytest.mark.parametrize("seed", [0, 2**32, 2**64 - 1])
def test_every_seed_is_itself(ipa_run: Run, tmp_path: Path, seed: int) -> None:
    code, out, _ = ipa_run(
        "--prompt", "a cat", *SMALL, "--seed", seed, "--output", tmp_path / "x.png", "--format", "json"
    )
    assert code == 0
    assert json.loads(out)["request"]["seed"] == seed


def test_a_drawn_seed_is_reported(ipa_run: Run, tmp_path: Path) -> None:
    runs = [
        json.loads(ipa_run("--prompt", "a cat", *SMALL, "--output", tmp_path / "x.png", "--format", "json")[1])
        for _ in range(2)
    ]
    assert runs[0]["request"]["seed"] != runs[1]["request"]["seed"]


def test_an_empty_prompt_is_fine_with_an_image(ipa_run: Run, reference: Path, tmp_path: Path) -> None:
    assert ipa_run("--image", reference, "--prompt", "", *SMALL, "--output", tmp_path / "x.png")[0] == 0
    assert "nothing to draw from" in refused(ipa_run(*SMALL))


def test_a_long_prompt_is_cut_with_a_warning_that_says_what_was_cut(ipa_run: Run, tmp_path: Path) -> None:
    prompt = " ".join(["cat"] * 75 + ["dog"] * 425)
    code, _, err = ipa_run("--prompt", prompt, *SMALL, "--output", tmp_path / "x.png")
    assert code == 0
    assert err.startswith("ipa-run: warning: the prompt is longer than 75 tokens; this was cut off: 'dog dog")
    assert err.count("dog") == 425


def test_options_without_effect_are_refused_or_warned_of(ipa_run: Run, tmp_path: Path) -> None:
    assert "but no image" in refused(ipa_run("--prompt", "a cat", *SMALL, "--ip-adapter-scale", 0.5))
    assert "but no image" in refused(ipa_run("--prompt", "a cat", *SMALL, "--adapter", "default"))
    arguments = ["--prompt", "a cat", *SMALL, "--negative-prompt", "dog", "--output", tmp_path / "x.png"]
    assert ipa_run(*arguments)[2] == ""
    warned = ipa_run(*arguments, "--guidance-scale", 1, "--guidance-rescale", 0.7)[2]
    for name in ("negative prompt", "guidance rescale"):
        assert f"the {name} has no effect at guidance scale 1.0" in warned


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


def test_the_python_api(tiny_bundle: Path, reference: Path) -> None:
    seen: list[tuple[int, int]] = []
    fields: dict[str, Any] = {"image": Image.open(reference), "seed": 0, "height": 64, "width": 64}
    with Pipeline.open(tiny_bundle) as pipe:
        images = pipe(
            prompt="a cat",
            num_inference_steps=3,
            scheduler="ddim",
            callback=lambda step: seen.append((step.index, step.count)),
            **fields,
        )
    assert [image.size for image in images] == [(64, 64)]
    assert seen == [(0, 3), (1, 3), (2, 3)]
