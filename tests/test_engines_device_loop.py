"""The denoising loop on the device and the kernels that it runs, on the stand-in for a GPU of tests/fake_gpu.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_gpu import HERE, REQUEST, STANDS_IN, for_rtx, random_picture, run, script, store_plans

from ipa.engines.bundle import hash_file

pytestmark = STANDS_IN


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IPA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return random_picture(tmp_path / "reference.png")


LATENTS = """
import ctypes, json, sys
from pathlib import Path
import numpy as np
from ipa.runtime import Pipeline
from ipa.runtime.request import Request

count = ctypes.CDLL("libcuda.so.1").fake_count
requests = json.loads(sys.argv[2])
report = []
with Pipeline.open(sys.argv[1], engine="tensorrt") as ours, Pipeline.open(sys.argv[1], engine="onnxruntime") as oracle:
    for fields in requests[::-1]:
        request = Request(prompt="a cat", image=sys.argv[3], seed=1, height=64, width=96, **fields)
        expected = [step.latents for step in oracle.steps(request)]
        found, uploads = [], []
        for step in ours.steps(request):
            found.append(step.latents)
            uploads.append(count(b"uploads"))
        worst = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True))
        report.append({"worst": worst, "uploads": np.diff(uploads).tolist()})
    steps = ours.steps(request)
    next(steps)
    report.append(count(b"buffers"))
    del steps  # given up in the middle
    report.append(count(b"buffers"))
report.append([count(name) for name in (b"buffers", b"modules", b"graphs", b"contexts")])
print(json.dumps(report))
"""


def test_latents_stay_on_the_device(
    gpu: dict[str, str], cache: Path, tiny_bundle: Path, tiny_half_bundle: Path, picture: Path
) -> None:
    # Copies a step: the timestep, then noise, or the sample where the arithmetic is not linear.
    requests: list[tuple[dict[str, Any], int]] = [
        ({"scheduler": "euler", "num_inference_steps": 5}, 1),
        ({"scheduler": "pndm", "num_inference_steps": 6, "guidance_scale": 1.0}, 1),
        ({"scheduler": "unipc", "num_inference_steps": 5, "num_images": 2}, 1),
        ({"scheduler": "euler-ancestral", "num_inference_steps": 3}, 2),
        ({"scheduler": "ddim", "num_inference_steps": 3}, 2),  # the model's configuration has it clip
        ({"num_inference_steps": 3, "guidance_rescale": 0.7}, 2),
    ]
    fields = json.dumps([request for request, _ in requests])
    for bundle, tolerance in ((tiny_bundle, 1e-5), (tiny_half_bundle, 5e-3)):
        store_plans(cache, bundle)
        found = script({**gpu, "IPA_CACHE": str(cache)}, LATENTS, bundle, fields, picture)
        *runs, in_use, after, left = found
        assert max(run["worst"] for run in runs) < tolerance
        assert [set(run["uploads"]) for run in reversed(runs)] == [{copies} for _, copies in requests]
        assert in_use == after + 3, "state, weights, noise"
        assert left == [0, 0, 0, 0]


def test_gpu_check_compares_the_loops(gpu: dict[str, str], cache: Path, tiny_bundle: Path) -> None:
    store_plans(cache, tiny_bundle)
    text = """
import json, sys
from pathlib import Path
from ipa.benchmarks.gpu_check import own_loop
from ipa.engines.bundle import Bundle
bundle = Bundle.open(Path(sys.argv[1]), verify=False)
found = own_loop(bundle, "tensorrt", 8, 3), own_loop(bundle, "onnxruntime", 8, 3)
print(json.dumps(found))
"""
    found, none = script({**gpu, "IPA_CACHE": str(cache)}, text, tiny_bundle)
    assert none == {}
    assert found["passed"]
    assert 0 < found["device_loop"]["relative_error"] < 1e-4, "both loops were run"
    assert found["device_loop"]["milliseconds_a_step"].keys() == {"device", "host"}


def test_rtx_compiles_kernels_once(gpu: dict[str, str], cache: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    store_plans(cache, tiny_bundle, for_rtx)
    options = ("--bundle", tiny_bundle, "--engine", "tensorrt-rtx", "--output", tmp_path / "x.png", *REQUEST)

    def compiled() -> int:
        done = run(gpu, cache, *options)
        assert done.returncode == 0, done.stderr
        return done.stderr.count("compiled a kernel")

    assert compiled() == 4, "text encoder, its keys and values, UNet, decoder"
    files = {path: path.stat().st_mtime_ns for path in cache.glob("*.kernels")}
    assert len(files) == 4
    assert compiled() == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files, "nothing new, nothing written"
    for path in files:
        path.write_bytes(path.read_bytes()[:-1])
    assert compiled() == 4
    assert compiled() == 0


def test_the_kernels_are_their_sources() -> None:
    folder = HERE.parent / "engines"
    for source in folder.glob("*.cu"):
        header = source.with_suffix(".ptx").read_text().splitlines()[0]
        assert header == f"// {source.name}, sha256 {hash_file(source)}", "python -m ipa.export.compile_kernels"
