"""`python -m ipa.benchmarks.demo_quality`: what was asked for is what is drawn, and bad input is one message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from ipa.benchmarks import demo_quality
from ipa.runtime import Pipeline


def test_guidance_scale_0_is_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def draw(self: Pipeline, **fields: Any) -> list[Image.Image]:
        asked.append(fields["guidance_scale"])
        return [Image.new("RGB", (128, 128), "red")]

    monkeypatch.setattr(Pipeline, "__call__", draw)
    arguments = ["--pairs", "2", "--guidance-scale", "0", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(demo_quality.main, arguments)
    assert done.exit_code == 0, done.output
    assert asked == [0.0] * 2 * len(demo_quality.SCALES)
    record = json.loads((tmp_path / "out/demo_quality.json").read_text("utf-8"))
    assert (record["guidance_scale"], record["pairs"]) == (0.0, 2)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["demo_quality.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bundle", "nowhere"], "nowhere"),
        (["--engine", "steam"], "unknown engine 'steam'"),
        (["--guidance-scale", "nan", "--pairs", "1"], "guidance_scale"),
        (["--pairs", "0"], "0 is not in the range x>=1"),
        (["--steps", "0"], "0 is not in the range x>=1"),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(demo_quality.main, [*arguments, "--output", str(tmp_path / "out")])
    assert done.exit_code == 2 and message in done.stderr, done.output
    if "Usage:" not in done.stderr:
        assert done.stderr.startswith("demo_quality: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "__call__", lambda self, **fields: [Image.new("RGB", (128, 128), "red")])
    (tmp_path / "out").write_text("")
    done = CliRunner().invoke(demo_quality.main, ["--pairs", "1", "--output", str(tmp_path / "out")])
    assert done.exit_code == 2 and done.stderr.startswith(f"demo_quality: {tmp_path}/out: ")
    assert done.stderr.count("\n") == 1
