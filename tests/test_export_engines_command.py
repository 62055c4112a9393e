"""`ipa-export build-engines` when it is interrupted, has no room, or is asked for what does not fit."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from build_calls import OPTIONS, build, change_graph, reasons, use_unknown_operator
from click.testing import CliRunner

from ipa.engines.bundle import Bundle
from ipa.engines.cuda_driver import NoDriver, find_driver
from ipa.engines.errors import EngineError
from ipa.engines.plan_cache import PlanCache
from ipa.engines.shape_profile import ShapeProfile
from ipa.export import resources
from ipa.export.cli import main
from ipa.export.engine_builds import EngineBuilds


def test_killing_a_build_leaves_bundle_and_cache_usable(tiny_half_bundle: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    command = [Path(sys.executable).with_name("ipa-export"), "build-engines", "--bundle", tiny_half_bundle]
    command += ["--cache", cache, "--engine", "tensorrt-rtx", *OPTIONS]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:  # kill it while it builds the UNet
        if line == "build unet\n":
            break
    while not list(cache.glob(".build-*/task.json")):
        time.sleep(0.01)
    (task,) = cache.glob(".build-*/task.json")
    assert json.loads(task.read_text())["graph"].endswith("unet/model.onnx")
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {header.key.component for _, header in PlanCache(cache).headers()}
    assert finished == {"text_encoder", "text_kv", "image_encoder"}
    result = build(tiny_half_bundle, cache)
    assert result.exit_code == 0, result.output
    found = reasons(result.stdout)
    assert {component for component, reason in found.items() if reason.startswith("kept")} == finished
    assert not list(cache.glob(".build-*"))


def test_when_one_build_fails_the_others_end(
    tiny_half_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(tiny_half_bundle, tmp_path / "bundle"))
    (tmp_path / "onnx.py").write_text("raise SystemExit('code of the current folder ran')")
    monkeypatch.chdir(tmp_path)
    change_graph(bundle, "image_encoder", use_unknown_operator)
    opened, cache = Bundle.open(bundle, verify=False), PlanCache(tmp_path / "cache")
    builds = EngineBuilds(opened, cache, "tensorrt-rtx", ShapeProfile.parse(["128x128"], "1", "4"))
    jobs = {job.component: job for job in builds.survey()[1]}
    with pytest.raises(EngineError, match=r"image_encoder: .*\(peak memory .*[1-9].* GiB\); .*refused the graph"):
        builds.run([jobs["unet"], jobs["image_encoder"], jobs["text_kv"]], at_once=2)
    assert not list(cache.headers()), "the UNet's build was ended, and no other begun"
    assert [path.name for path in cache.root.iterdir()] == ["key"]
    with pytest.raises(EngineError, match="stopped"):
        builds.run([jobs["text_kv"]])


def test_want_of_memory_or_disk_is_said_before(
    tiny_half_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "available_memory", lambda: 2**28)
    result = build(tiny_half_bundle, tmp_path / "cache")
    assert result.exit_code == 2
    assert re.search(r"building needs about [0-9.]+ GiB of memory, 0\.2 GiB are available", result.stderr)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20})())
    result = build(tiny_half_bundle, tmp_path / "cache")
    assert result.exit_code == 2
    assert re.search(r"building needs about [0-9.]+ GiB of disk in .*, 0\.0 GiB are free", result.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bundle", "BUNDLE", "--resolution", "500x512"], "multiples of 8"),
        (["--bundle", "BUNDLE", "--batch", "4:1"], "--batch"),
        (["--bundle", "BUNDLE", "--compute-capability", "9.9"], "9.9 is none of 7.5, 8.0"),
        (["--bundle", "BUNDLE", "--compute-capability", "8.6,8.6"], "8.6,8.6 names one twice"),
        (["--base", "x", "--output", "y", "--batch", "4:1"], "--batch"),  # before the export
        (["--base", "x", "--output", "y", "--compute-capability", "9.9"], "9.9 is none of"),
        (["--bundle", "BUNDLE", "--base", "x"], "name a bundle with --bundle, or a pipeline with --base"),
        (["--bundle", "BUNDLE", "--adapter", "x"], "--adapter goes with --base"),
        (["--base", "x"], "the bundle to write with --output"),
        (["--bundle", "nowhere"], "is not a folder"),
    ],
)
def test_options_that_do_not_fit(tiny_half_bundle: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    given = [str(tiny_half_bundle) if argument == "BUNDLE" else argument for argument in arguments]
    command = ["build-engines", "--engine", "tensorrt-rtx", "--cache", str(tmp_path / "cache"), *given]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_from_a_pipeline_in_one_command(tiny_base: Path, tiny_adapter_file: Path, tmp_path: Path) -> None:
    arguments = ["--base", tiny_base, "--adapter", f"mine={tiny_adapter_file}", "--output", tmp_path / "bundle"]
    arguments += ["--engine", "tensorrt-rtx", "--cache", tmp_path / "cache", *OPTIONS]
    result = CliRunner().invoke(main, ["build-engines", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert {record.dtype for record in manifest.components.values()} == {"float16"}
    assert "ip_adapter/mine" in reasons(result.stdout)


@pytest.mark.skipif(not isinstance(find_driver(), NoDriver), reason="there is a GPU")
def test_tensorrt_without_a_driver_says_what_to_do(
    tiny_half_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ipa.engines import tensorrt_library

    monkeypatch.setitem(tensorrt_library.MODULES, "tensorrt", "tensorrt_rtx")  # stands in: the same interface
    monkeypatch.setitem(tensorrt_library._OLDEST, "tensorrt", (1, 0))
    command = ["build-engines", "--bundle", str(tiny_half_bundle), "--cache", str(tmp_path), "--engine", "tensorrt"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "no NVIDIA driver here" in line
    assert "`--engine tensorrt-rtx` builds without one" in line
