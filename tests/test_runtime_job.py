"""What `ipa-run` makes of its options and of a picture's record, before any model is opened."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ipa.engines.errors import RequestError
from ipa.runtime import ControlImage, ImagePrompt, record
from ipa.runtime.cli import main
from ipa.runtime.job import Job
from ipa.runtime.metadata import pnginfo
from ipa.runtime.request import Request
from ipa.runtime.without_effect import without_effect

RECORD: dict[str, Any] = {
    "prompt": "a cat",
    "negative_prompt": "",
    "num_inference_steps": 4,
    "guidance_scale": 4.0,
    "seed": 1,
    "height": 64,
    "width": 64,
    "scheduler": "ddim",
    "adapter": None,
    "ip_adapter_scale": None,
    "num_images": 1,
    "only": None,
    "version": "0",
}
SIMPLE = {"image": "in.png", "adapter": "a", "ip_adapter_scale": 0.3}
WINDOW = {"image_prompts": [{"images": ["in.png"], "adapter": "a", "scale": 0.3, "end": 0.5}]}

Plan = Callable[..., tuple[Job | None, str]]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Plan:
    """The job that a command line becomes, or the message why not, with `x.png` of the given record at hand."""
    for name in ("in.png", "other.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    planned: list[Job] = []

    def run(self: Job, **_: Any) -> None:
        planned.append(self)
        raise RequestError("planned")

    monkeypatch.setattr(Job, "run", run)

    def call(*arguments: object, recorded: dict[str, Any] | None = None) -> tuple[Job | None, str]:
        if recorded is not None:
            Image.new("RGB", (8, 8)).save("x.png", pnginfo=pnginfo({**RECORD, **recorded}))
        planned.clear()
        monkeypatch.setattr(sys, "argv", ["ipa-run", *map(str, arguments)])
        with pytest.raises(SystemExit):
            main()
        return (planned[0] if planned else None), capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("recorded", "arguments", "expected"),
    [
        ({}, ["--image", "other.png"], {"image": "other.png"}),
        ({"ip_adapter_scale": 0.0}, ["--image", "other.png"], {"image": "other.png"}),  # what text alone once recorded
        ({"ip_adapter_scale": 0.0}, [], {}),
        (SIMPLE, [], SIMPLE),
        (SIMPLE, ["--image", "other.png"], {**SIMPLE, "image": "other.png"}),
        (SIMPLE, ["--adapter", "b"], {**SIMPLE, "adapter": "b"}),
        (SIMPLE, ["--ip-adapter-end", 0.5], {"image_prompts": (ImagePrompt(("in.png",), "a", 0.3, end=0.5),)}),
        (WINDOW, [], {"image_prompts": (ImagePrompt(("in.png",), "a", 0.3, end=0.5),)}),
        (WINDOW, ["--image", "other.png"], {"image_prompts": (ImagePrompt(("other.png",), "a", 0.3, end=0.5),)}),
        (WINDOW, ["--ip-adapter-end", 1], SIMPLE),
        (
            {"controls": [{"image": "in.png"}], "guess_mode": True},
            ["--no-guess-mode"],
            {"controls": (ControlImage("in.png"),)},
        ),
    ],
)
def test_options_go_over_what_a_picture_records(
    plan: Plan, recorded: dict[str, Any], arguments: list[object], expected: dict[str, Any]
) -> None:
    job, _ = plan("--from", "x.png", *arguments, recorded=recorded)
    assert job is not None
    fields = {name: value for name, value in RECORD.items() if name != "version"}
    assert job.request == Request(**{**fields, **expected})
    assert job.warnings == ()


def test_what_does_not_go_together_is_said(plan: Plan) -> None:
    several = {"image_prompts": [{"images": ["in.png"], "adapter": name} for name in ("a", "b")]}
    assert "by --adapter NAME, with NAME one of a, b" in plan("--from", "x.png", "--image", "y", recorded=several)[1]
    assert "x.png: image_prompts is 1" in plan("--from", "x.png", recorded={"image_prompts": 1})[1]
    job, err = plan("--image", "in.png", "--save-image-embeds", "nowhere/e.safetensors")
    assert (job, err) == (None, "ipa-run: output nowhere/e.safetensors: there is no folder nowhere; make it first\n")
    assert "is a folder" in plan("--image", "in.png", "--save-image-embeds", ".")[1]


def test_files_that_changed_are_named(plan: Plan) -> None:
    """Of every kind; not those that are named again."""
    prompts = [{"images": ["in.png"], "adapter": "a", "masks": ["other.png"]}, {"embeds": "e", "adapter": "b"}]
    Path("e").write_text("features")
    control = {"image": "in.png", "name": "edges"}
    files = dict.fromkeys(("in.png", "other.png", "e", "gone.png"), "of before")
    recorded = {"image_prompts": prompts, "controls": [control], "files": files}
    job, _ = plan("--from", "x.png", recorded=recorded)
    assert job is not None
    assert [text.split()[0] for text in job.warnings] == ["in.png", "other.png", "e"]
    job, _ = plan("--from", "x.png", "--control-image", "edges=in.png")
    assert job is not None
    assert [text.split()[0] for text in job.warnings] == ["other.png", "e"]


def test_files_are_looked_at_before_they_are_hashed(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("huge.png").open("wb") as file:
        file.truncate(2**40)

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(record, "hash_file", refuse)
    assert plan("--image", "huge.png")[0] is not None, "without --from there is nothing to compare with"
    assert "at most" in plan("--from", "x.png", "--image", "huge.png", recorded={})[1]
    assert "in.png: Permission denied" in plan("--from", "x.png", "--image", "in.png")[1]


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"guidance_rescale": 0.7}, "the guidance rescale has no effect at guidance scale 1.0"),
        ({"image_prompts": (ImagePrompt(("x",), "a", end=0.2),)}, "prompt of adapter 'a' has no effect: of 4 steps"),
        ({"controls": (ControlImage("x", "edges", start=0.8),)}, "of ControlNet 'edges' has no effect: of 4 steps"),
        ({"image_prompts": (ImagePrompt(("x",), "a", end=0.25),)}, ""),
    ],
)
def test_what_has_no_effect_is_warned_of(fields: dict[str, Any], warning: str) -> None:
    found = without_effect(Request(guidance_scale=1.0, **fields), 4)
    assert [warning in text for text in found] == ([True] if warning else []), json.dumps(found)
