"""Records and folders that `ipa-bench report` does not take."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from bench_records import (
    BASELINE,
    FULL_QUALITY,
    FULL_SPEED,
    contender,
    write,
)
from click.testing import CliRunner

from ipa.benchmarks.cli import main
from ipa.benchmarks.intervals import Interval
from ipa.benchmarks.records import Sweep


def damaged(**fields: Any) -> str:
    return json.dumps({"kind": "speed", "format_version": 1, **asdict(FULL_SPEED), **fields})


def no_sheet(name: str) -> str:
    sweep = asdict(Sweep(1, 1, [1.0], [Interval(0.5, 0.5, 0.5, 1)], None, name))
    return json.dumps({"kind": "quality", "format_version": 2, **asdict(FULL_QUALITY), "sweep": sweep})


def nested(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


WRONG = {
    "no JSON": ("{", "cannot be read as a record"),
    "nested too deeply": ("[" * 100_000, "cannot be read as a record"),
    "settings nested too deeply": (json.dumps({"kind": "speed", "x": nested(700)}), "is nested too deeply"),
    "something is missing": ('{"kind": "speed", "format_version": 1}', "'origin'"),
    "a newer format": ('{"kind": "quality", "format_version": 99}', "format 99"),
    "no number": (damaged(null=asdict(Interval(1, float("nan"), 1, 9))), "'null.low' is nan"),
    "no text": (damaged(baseline="\ud800"), "'baseline' is '\\ud800'"),
    "no time": (damaged(contenders=[asdict(contender("x", 0.25))]), "the step of 'x' takes 0.25 s (0.0 to 0.5)"),
    "twice": (damaged(contenders=[asdict(BASELINE)] * 2), "'torch-eager' is there more than once"),
    "another sweep": (no_sheet("sweep.png").replace('"clip_t": null, "sheet"', '"clip_t": [], "sheet"'), "0 clip_t"),
    "no sheet": (no_sheet("gone.png"), "no contact sheet 'gone.png'"),
    "a sheet elsewhere": (no_sheet("../r/sweep.png"), "no contact sheet '../r/sweep.png'"),
    "a sheet that is none": (no_sheet("other.json"), "cannot be read as PNG, JPEG or WebP"),
}


@pytest.mark.parametrize("case", WRONG)
def test_damaged_records_are_one_message(case: str, tmp_path: Path) -> None:
    text, message = WRONG[case]
    folder = write(tmp_path / "r")
    (folder / "record.json").write_text(text)
    assert_refused(["--records", str(folder), "--output", str(tmp_path / "o")], message)
    assert not (tmp_path / "o").exists()


def test_wrong_folders_are_one_message(tmp_path: Path) -> None:
    records = write(tmp_path / "full", speed=FULL_SPEED)
    assert_refused(["--records", str(tmp_path / "gone"), "--output", str(tmp_path / "o")], "is no folder")
    (tmp_path / "empty").mkdir()
    assert_refused(["--records", str(tmp_path / "empty"), "--output", str(tmp_path / "o")], "no record;")
    assert_refused(["--records", str(write(tmp_path / "r")), "--output", str(tmp_path / "o")], "(1 JSON files of other")
    (tmp_path / "file").touch()
    assert_refused(["--records", str(records), "--output", str(tmp_path / "file")], "cannot be written")


def assert_refused(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["report", *arguments])
    assert done.exit_code == 2, done.output
    assert message in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout
