"""`make gpu-check` on a machine without a GPU: the same command, on the engines that are there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from ipa.benchmarks import gpu_check
from ipa.engines.cuda_driver import NoDriver, find_driver
from ipa.export.cases import SIZES


@pytest.mark.skipif(not isinstance(find_driver(), NoDriver), reason="there is a GPU: run `make gpu-check`")
def test_what_is_here_is_built_checked_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPA_CACHE", str(tmp_path / "cache"))
    tiny = {**gpu_check.SMALL.unet, "block_out_channels": (16, 32, 32, 48), "sample_size": 8}
    monkeypatch.setattr(gpu_check, "SMALL", replace(gpu_check.SMALL, unet=tiny))
    monkeypatch.setattr("ipa.export.validate.SIZES", SIZES[:1])
    options = ["--folder", tmp_path / "models", "--output", tmp_path, "--rounds", 2, "--batch", 2]
    result = CliRunner().invoke(gpu_check.main, [str(option) for option in options])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    engines = record["engines"]
    assert {name for name, state in engines.items() if state.get("passed")} == {"openvino", "onnxruntime"}
    assert "no NVIDIA driver" in engines["tensorrt-rtx"]["obstacle"]
    assert engines["tensorrt-rtx"]["build"].startswith("7 built in ")
    assert "not installed: pip install 'ipa-runtime[cuda]'" in engines["onnxruntime-cuda"]["obstacle"]
    (speed,) = record["speed"]
    assert (speed["unet_batch"], speed["pixels"]) == (2, 64)
    eager = "torch_eager (cpu, float32)"
    assert speed["seconds_median"].keys() == {eager, "openvino", "onnxruntime"}
    assert speed["speedup_over_torch_eager"][eager]["median"] == 1
    assert "| openvino |" in result.output


def test_a_build_that_fails_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("no such symbol")

    monkeypatch.setattr(gpu_check, "build_engine", broken)
    monkeypatch.setattr(gpu_check.Bundle, "open", lambda root: None)
    monkeypatch.setenv("IPA_CACHE", str(tmp_path / "cache"))
    found = gpu_check.build(tmp_path, "tensorrt-rtx", 512)
    assert found == {"build": "FAILED: RuntimeError('no such symbol')", "passed": False}
