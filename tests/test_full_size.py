"""SD1.5 at full size, random weights: FP16 export and all engines on a machine without a GPU, within its memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ipa.engines.bundle import Bundle
from ipa.engines.plan_cache import PlanCache

MAX_MEMORY = 16 * 2**20  # KiB, as getrusage counts


def command(*arguments: object) -> str:
    return subprocess.run([*map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.slow
def test_the_full_set_exports_and_builds(tmp_path: Path) -> None:
    models, bundle, cache = tmp_path / "sd15", tmp_path / "bundle", tmp_path / "cache"
    export = Path(sys.executable).with_name("ipa-export")
    command(sys.executable, "-m", "ipa.benchmarks.full_size", "--output", models)
    adapter = models / "ip-adapter.safetensors"
    command(export, "onnx", "--base", models / "base", "--adapter", adapter, "--dtype", "fp16", "--output", bundle)
    build = [export, "build-engines", "--bundle", bundle, "--engine", "tensorrt-rtx", "--cache", cache]
    sizes = ["--resolution", "512x512", "--resolution", "256x256", "--resolution", "768x768"]
    assert "7 built, 0 kept" in command(*build, *sizes)
    again = command(*build, *sizes)
    assert "0 built, 7 kept" in again
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < MAX_MEMORY
    headers = {header.key.component: header for _, header in PlanCache(cache).headers()}
    assert set(headers) == {*Bundle.open(bundle, verify=False).manifest.components, "ip_adapter/ip-adapter"}
    assert headers["unet"].tensors["sample"] == "float16 1x4x32x32:2x4x64x64:8x4x96x96"
    assert headers["unet"].tensors["image_kv"] == "float16 1x1x24960:2x4x24960:8x1028x24960"
