"""`ipa-run` as its user meets it: the right picture, or exit code 2 and one message."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Run, refused
from PIL import Image

from ipa.engines import registry
from ipa.engines.engine import GraphFile
from ipa.engines.registry import Backend
from ipa.runtime import Pipeline
from ipa.runtime.cli import SCHEDULERS
from ipa.runtime.schedulers import SCHEDULER_NAMES

SMALL = ["--steps", "2", "--height", "64", "--width", "64"]


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
