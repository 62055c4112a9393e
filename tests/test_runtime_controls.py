"""ControlNet options of `ipa-run`, and requests with control images in files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Run, call_ipa_run
from PIL import Image

from ipa.engines.errors import RequestError
from ipa.runtime.control_image import ControlImage
from ipa.runtime.control_options import CONTROL_OPTIONS, control_fields
from ipa.runtime.metadata import read_request
from ipa.runtime.request_lines import read_lines

SMALL = ["--steps", "2", "--height", "64", "--width", "64", "--seed", "0", "--engine", "onnxruntime"]


def fields(**given: list[str]) -> dict[str, Any]:
    assert set(given) <= set(CONTROL_OPTIONS)
    return control_fields({option: given.get(option, []) for option in CONTROL_OPTIONS})


def test_options_become_control_images() -> None:
    assert fields() == {}
    assert fields(control_image=["a.png"]) == {"controls": (ControlImage("a.png"),)}
    assert fields(control_image=["./x=1.png"]) == {"controls": (ControlImage("./x=1.png"),)}
    assert fields(control_image=["canny=a.png"], controlnet_scale=["0.5"], control_end=["canny=0.8"]) == {
        "controls": (ControlImage("a.png", "canny", 0.5, end=0.8),)
    }
    assert fields(
        control_image=["canny=a.png", "pose=b.png"], controlnet_scale=["pose=0"], control_start=["canny=0.25"]
    ) == {"controls": (ControlImage("a.png", "canny", start=0.25), ControlImage("b.png", "pose", 0.0))}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"control_image": ["a.png", "b.png"]}, "given twice for the ControlNet; name each: NAME=FILE"),
        ({"control_image": ["x=a.png", "x=b.png"]}, "given twice for ControlNet 'x'"),
        ({"control_image": ["x=a.png", "b.png"]}, r"--control-image b.png: which ControlNet is it for"),
        ({"controlnet_scale": ["0.5"]}, r"--controlnet-scale 0.5 is for a control image: add --control-image"),
        ({"control_image": ["x=a", "y=b"], "control_end": ["0.5"]}, r"Write --control-end NAME=0.5, with one of x, y"),
        ({"control_image": ["x=a"], "control_end": ["y=0.5"]}, r"no control image for 'y' \(there is: x\)"),
        ({"control_image": ["a"], "control_end": ["y=0.5"]}, r"no control image for 'y' \(there is: none by name\)"),
        ({"control_image": ["x=a"], "controlnet_scale": ["loud"]}, "--controlnet-scale is 'loud', expected a number"),
        ({"control_image": ["x=a"], "controlnet_scale": ["nan"]}, "finite"),
        ({"control_image": ["x=a"], "controlnet_scale": ["1", "x=2"]}, "given twice for ControlNet 'x'"),
        ({"control_image": ["x=a"], "control_start": ["0.6"], "control_end": ["0.5"]}, "less than the end"),
    ],
)
def test_options_that_do_not_fit(given: dict[str, list[str]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        fields(**given)


@pytest.fixture
def ipa_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command where `edges.png` and `pose.png` lie; returns exit code, standard output, standard error."""
    for seed, name in enumerate(("edges", "pose")):
        pixels = np.random.default_rng(seed).integers(0, 255, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((90, 60)).save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)

    return partial(call_ipa_run, monkeypatch, capsys)


def test_a_picture_is_made_again(ipa_run: Run, tiny_control_bundle: Path) -> None:
    options = [
        "--control-image",
        "edges=edges.png",
        "--control-image",
        "pose=pose.png",
        "--controlnet-scale",
        "pose=0.5",
    ]
    options += ["--control-start", "edges=0.5", "--guess-mode", "--prompt", "a cat"]
    assert ipa_run("--bundle", tiny_control_bundle, *options, *SMALL, "--output", "1.png") == (0, "1.png\n", "")
    recorded = read_request(Path("1.png"))
    assert recorded["guess_mode"] is True
    assert recorded["controls"] == [
        {"image": "edges.png", "name": "edges", "scale": 1.0, "start": 0.5, "end": 1.0},
        {"image": "pose.png", "name": "pose", "scale": 0.5, "start": 0.0, "end": 1.0},
    ]
    assert ipa_run("--from", "1.png", "--output", "2.png") == (0, "2.png\n", "")
    first, second = (np.asarray(Image.open(name)) for name in ("1.png", "2.png"))
    np.testing.assert_array_equal(first, second)

    code, _, err = ipa_run("--from", "1.png", "--control-image", "edges=edges.png", "--output", "3.png")
    assert (code, err) == (0, "")
    assert np.abs(np.asarray(Image.open("3.png"), int) - first).max() > 2
    assert [control["name"] for control in read_request(Path("3.png"))["controls"]] == ["edges"]

    Image.open("pose.png").resize((30, 20)).save("pose.png")
    code, _, err = ipa_run("--from", "1.png", "--output", "4.png")
    assert (code, err) == (
        0,
        "ipa-run: warning: pose.png is not the file that 1.png was made with; the result will differ\n",
    )


def test_one_message_for_what_does_not_fit(ipa_run: Run, tiny_control_bundle: Path, tiny_bundle: Path) -> None:
    for bundle, options, message in (
        (tiny_control_bundle, ["--control-image", "edges.png"], "several ControlNets: write --control-image NAME=FILE"),
        (tiny_control_bundle, ["--control-image", "edges=no.png"], "no.png"),
        (tiny_control_bundle, ["--control-image", "x=edges.png"], "no ControlNet 'x' (it has: edges, mood, pose)"),
        (tiny_control_bundle, ["--guess-mode"], "add --control-image"),
        (tiny_bundle, ["--control-image", "edges.png"], "has no ControlNet: export it again"),
    ):
        code, out, err = ipa_run("--bundle", bundle, "--prompt", "a cat", *SMALL, *options)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert message in err


def test_requests_from_a_file(ipa_run: Run, tiny_control_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "lines").mkdir()
    (tmp_path / "edges.png").rename(tmp_path / "lines" / "edges.png")
    control = {"image": "edges.png", "name": "edges", "scale": 0.7}
    lines = [
        {"id": "a", "prompt": "a cat", "controls": [control]},
        {"id": "b", "controls": [{**control, "scale": 0.2}], "guess_mode": True},
        {"id": "c", "prompt": "a cat", "controls": control},
        {"id": "d", "prompt": "a cat", "controls": [{"name": "edges"}]},
        {"id": "e", "prompt": "a cat", "controls": [{**control, "loud": 1}]},
    ]
    file = tmp_path / "lines" / "requests.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    good, *bad = read_lines(file, {})
    assert good.request is not None
    assert good.request.controls == (ControlImage(str(tmp_path / "lines" / "edges.png"), "edges", 0.7),)
    assert [line.problem for line in bad[:1]] == [""], "a control image is enough to draw from"
    assert "expected a list" in bad[1].problem
    assert "is not a control image" in bad[2].problem
    assert "is not a control image" in bad[3].problem
    code, _, err = ipa_run("--bundle", tiny_control_bundle, "--requests", file, *SMALL, "--output", "out", "--batch", 2)
    assert code == 1
    assert err.count("\n") == 3, err
    assert sorted(path.name for path in Path("out").glob("*.png")) == ["a.png", "b.png"]
