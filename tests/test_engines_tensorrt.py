"""Running plans, on the stand-in for a GPU of tests/fake_gpu.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import REQUEST, STANDS_IN, Change, random_picture, run, script, store_plans
from PIL import Image

pytestmark = STANDS_IN


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IPA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return random_picture(tmp_path / "reference.png")


DEVICE = """
import ctypes, json
import numpy as np
from ipa.engines.cuda_device import CudaDevice
from ipa.engines.errors import EngineError

def refused(work):
    try:
        work()
    except EngineError as error:
        return str(error)

with CudaDevice() as device:
    array, back = np.arange(6, dtype=np.float32), np.empty(6, np.float32)
    pointer = device.allocate(array.nbytes)
    device.upload(pointer, array)
    device.download(back, pointer)
    device.synchronize()
    full = refused(lambda: device.allocate(2**40))
    graph = device.capture(lambda: device.upload(pointer, array))
    device.launch(graph)
    def fails():
        raise EngineError("not in a graph")
    stopped = refused(lambda: device.capture(fails))
    device.upload(pointer, array)  # the stream has left capture mode
    wrong = refused(lambda: device.launch(0))
device.close()
count = ctypes.CDLL("libcuda.so.1").fake_count
names = ("contexts", "buffers", "graphs", "streams", "launches", "copies_captured", "uploads")
print(json.dumps({"back": back.tolist(), "full": full, "stopped": stopped, "wrong": wrong,
                  **{name: count(name.encode()) for name in names}}))
"""


def test_memory_copies_and_graphs(gpu: dict[str, str]) -> None:
    found = script(gpu, DEVICE)
    assert found["back"] == [0, 1, 2, 3, 4, 5]
    assert found["full"].startswith("GPU memory is full: 1048576 MiB wanted, 512 of 1024 MiB are free")
    assert found["stopped"] == "not in a graph"
    assert found["wrong"] == "CUDA failed: invalid argument (CUDA_ERROR_INVALID_VALUE)"
    assert (found["launches"], found["copies_captured"], found["uploads"]) == (1, 1, 2)
    assert [found[name] for name in ("contexts", "buffers", "graphs", "streams")] == [0, 0, 0, 0], "all given back"


def test_ipa_run_takes_the_plans_by_itself(
    gpu: dict[str, str], cache: Path, tiny_bundle: Path, picture: Path, tmp_path: Path
) -> None:
    store_plans(cache, tiny_bundle)
    images, records = [], []
    for engine in ("auto", "tensorrt", "onnxruntime"):
        target = tmp_path / f"{engine}.png"
        options = ("--image", picture, "--bundle", tiny_bundle, "--engine", engine, "--output", target)
        done = run(gpu, cache, *options, *REQUEST)
        assert done.returncode == 0, done.stderr
        records.append(json.loads(done.stdout))
        images.append(np.asarray(Image.open(target)))
    assert [record["engine"] for record in records] == ["tensorrt", "tensorrt", "onnxruntime"]
    assert records[0]["engine_reason"].startswith("the fastest that runs here: NVIDIA GPUs")
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_allclose(images[0], images[2].astype(float), atol=1)  # the same sums in another order


def test_validate_compares_the_sizes_that_were_built(
    gpu: dict[str, str], cache: Path, tiny_bundle: Path, tiny_base: Path, tiny_adapter_file: Path
) -> None:
    store_plans(cache, tiny_bundle)
    command = [sys.executable, "-c", "from ipa.export.cli import main; main()", "validate", "--engine", "tensorrt"]
    command += ["--bundle", tiny_bundle, "--base", tiny_base, "--adapter", f"tiny={tiny_adapter_file}"]
    environment = {**gpu, "IPA_CACHE": str(cache)}
    done = subprocess.run([*map(os.fspath, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    assert "ok   unet" in done.stdout


def test_a_prompt_alone(gpu: dict[str, str], cache: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    store_plans(cache, tiny_bundle)
    options = ("--bundle", tiny_bundle, "--engine", "tensorrt", "--output", tmp_path / "x.png")
    assert run(gpu, cache, *options, *REQUEST).returncode == 0


def test_an_adapter_without_an_engine_runs_elsewhere_under_auto(
    gpu: dict[str, str], cache: Path, tiny_bundle: Path, picture: Path, tmp_path: Path
) -> None:
    store_plans(cache, tiny_bundle)
    next(cache.glob("ip_adapter-tiny-*.plan")).unlink()
    options = ("--image", picture, "--bundle", tiny_bundle, "--output", tmp_path / "x.png", *REQUEST)
    done = run(gpu, cache, *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["engine"] == "tensorrt"
    done = run(gpu, cache, *options, "--engine", "tensorrt")
    assert done.returncode == 2
    assert "ip_adapter/tiny: no engine for tensorrt in the cache: none has been built" in done.stderr


ENGINE = """
import ctypes, json, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from ipa.engines.bundle import Bundle

count = ctypes.CDLL("libcuda.so.1").fake_count
bundle = Bundle.open(Path(sys.argv[1]), verify=False)
rng = np.random.default_rng(0)
kv = bundle.manifest.kv_layout.size
def inputs(side, tokens=4):
    return {"sample": rng.standard_normal((2, 4, side, side)).astype("f"), "timestep": np.array(500, "f"),
            "text_kv": rng.standard_normal((2, 77, kv)).astype("f"),
            "image_kv": rng.standard_normal((2, tokens, kv)).astype("f")}
report = {"uploads": [], "launches": [], "worst": []}
with bundle.open_component("unet", "tensorrt") as engine, bundle.open_component("unet", "onnxruntime") as oracle:
    for side in (8, 16):
        arrays = inputs(side)
        for name in ("text_kv", "image_kv"):
            arrays[name].flags.writeable = False
        for step in range(4):
            arrays["sample"] = rng.standard_normal(arrays["sample"].shape).astype("f")
            before = count(b"uploads"), count(b"launches")
            found = engine(**arrays)["noise_pred"]
            report["uploads"].append(count(b"uploads") - before[0])
            report["launches"].append(count(b"launches") - before[1])
            report["worst"].append(float(np.abs(found - oracle(**arrays)["noise_pred"]).max()))
    arrays["text_kv"] = arrays["text_kv"] * 2  # another array, writable
    report["worst"].append(float(np.abs(engine(**arrays)["noise_pred"] - oracle(**arrays)["noise_pred"]).max()))
    arrays["text_kv"] *= 0.5  # the same one, changed
    report["worst"].append(float(np.abs(engine(**arrays)["noise_pred"] - oracle(**arrays)["noise_pred"]).max()))
    report["captured"] = [engine.is_captured]
    ctypes.CDLL("libcuda.so.1").fake_fail_captures(1)
    arrays = inputs(8)
    for step in range(3):
        found = engine(**arrays)["noise_pred"]
        report["worst"].append(float(np.abs(found - oracle(**arrays)["noise_pred"]).max()))
    report["captured"].append(engine.is_captured)
    with ThreadPoolExecutor(1) as pool:  # another thread has no context of its own
        found = pool.submit(engine, **arrays).result()["noise_pred"]
    report["worst"].append(float(np.abs(found - oracle(**arrays)["noise_pred"]).max()))
    report["buffers"] = count(b"buffers")
    report["precision"] = engine.precision
    report["loaded"] = engine.load_seconds > 0
report["left"] = [count(name) for name in (b"buffers", b"graphs", b"streams", b"contexts")]
print(json.dumps(report))
"""


def test_steps_copy_only_what_changes_and_become_one_graph(gpu: dict[str, str], cache: Path, tiny_bundle: Path) -> None:
    store_plans(cache, tiny_bundle)
    found = script({**gpu, "IPA_CACHE": str(cache)}, ENGINE, tiny_bundle)
    assert max(found["worst"]) == 0  # the same library on the same arrays
    assert found["uploads"] == [4, 2, 2, 2] * 2, "keys and values once for each shape"
    assert found["launches"] == [0, 1, 1, 1] * 2, "the first call sets up, then it is a graph"
    assert found["buffers"] == 5
    assert found["captured"] == [True, False], "where a graph cannot be made it runs all the same"
    assert found["left"] == [0, 0, 0, 0]
    assert (found["precision"], found["loaded"]) == ("float32", True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda key: replace(key, target="8.9 NVIDIA L4"), "it is for 8.9 NVIDIA L4, this GPU is 9.0 Fake GPU"),
        (lambda key: replace(key, version="10.13.3"), "version was 10.13.3, is 11.0.0.1"),
        (lambda key: replace(key, weights="0" * 64), "weights differ"),
        (lambda key: replace(key, recipe="0"), "recipe was 0"),
        (lambda key: replace(key, platform="windows-amd64"), "platform was windows-amd64"),
        (lambda key: replace(key, engine="tensorrt-rtx"), "none has been built"),
    ],
)
def test_a_plan_that_does_not_fit_is_not_run(
    gpu: dict[str, str], cache: Path, tiny_bundle: Path, tmp_path: Path, change: Change, reason: str
) -> None:
    store_plans(cache, tiny_bundle, change)
    options = ("--bundle", tiny_bundle, "--output", tmp_path / "x.png")
    done = run(gpu, cache, *options, "--engine", "tensorrt", *REQUEST)
    assert done.returncode == 2
    assert reason in done.stderr
    assert f"`ipa-export build-engines --bundle {tiny_bundle} --engine tensorrt`" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


def test_auto_takes_another_engine_and_says_why(
    gpu: dict[str, str], cache: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    store_plans(cache, tiny_bundle, lambda key: replace(key, weights="0" * 64))
    options = ("--bundle", tiny_bundle, "--output", tmp_path / "x.png", "--engine", "auto", *REQUEST)
    record = json.loads(run(gpu, cache, *options).stdout)
    assert record["engine"] == "openvino"
    assert "weights differ" in record["engine_reason"]


def test_a_changed_plan_is_not_run(gpu: dict[str, str], cache: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    store_plans(cache, tiny_bundle)
    (path,) = cache.glob("unet-*.plan")
    content = path.read_bytes()
    arguments = ("--bundle", tiny_bundle, "--output", tmp_path / "x.png", "--engine", "tensorrt", *REQUEST)
    for changed in (content[:-1] + bytes([content[-1] ^ 1]), content[:60] + b"!" + content[61:], content[:-1]):
        path.write_bytes(changed)
        done = run(gpu, cache, *arguments)
        assert done.returncode == 2
        assert "unet: " in done.stderr
        assert "ipa-export build-engines" in done.stderr
    path.write_bytes(content)
    assert run(gpu, cache, *arguments).returncode == 0


def test_a_size_that_was_not_built_for(gpu: dict[str, str], cache: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    store_plans(cache, tiny_bundle)
    arguments = ("--bundle", tiny_bundle, "--output", tmp_path / "x.png", "--engine", "tensorrt", *REQUEST)
    done = run(gpu, cache, *arguments, "--width", "256")
    assert done.returncode == 2
    assert "unet: no engine was built for sample 2x4x8x32" in done.stderr
    assert "--resolution" in done.stderr


def test_plans_of_others_run_only_when_they_are_named(
    gpu: dict[str, str], cache: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    others = tmp_path / "others"
    store_plans(others, tiny_bundle)
    arguments = ("--bundle", tiny_bundle, "--output", tmp_path / "x.png", "--engine", "tensorrt", *REQUEST)
    shutil.copytree(others, cache, ignore=lambda folder, names: ["key"])  # signed by a key that this user has not
    cache.chmod(0o700)
    done = run(gpu, cache, *arguments)
    assert (done.returncode, "none has been built" in done.stderr) == (2, True)
    done = run(gpu, cache, *arguments, "--trust-engines", others)
    assert done.returncode == 0, done.stderr
    other_engine = [*arguments[:5], "onnxruntime", *arguments[6:]]
    done = run(gpu, cache, *other_engine, "--trust-engines", others)
    assert (done.returncode, "is for --engine tensorrt or tensorrt-rtx" in done.stderr) == (2, True)
    done = run(gpu, cache, *arguments, "--trust-engines", tmp_path / "nothing")
    assert (done.returncode, "is not a folder" in done.stderr) == (2, True)
    (path,) = others.glob("unet-*.plan")
    path.write_bytes(path.read_bytes()[:-1])
    done = run(gpu, cache, *arguments, "--trust-engines", others)
    assert (done.returncode, "is refused" in done.stderr) == (2, True)


def test_what_the_library_says_is_in_the_message(
    gpu: dict[str, str], cache: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, moved)
    store_plans(cache, moved)
    (moved / "text_kv" / "model.onnx").unlink()  # the stand-in's plan is this path
    text = """
import json, sys
from pathlib import Path
from ipa.engines.bundle import Bundle
from ipa.engines.errors import EngineError
try:
    Bundle.open(Path(sys.argv[1]), verify=False).open_component("text_kv", "tensorrt")
except EngineError as error:
    print(json.dumps(str(error)))
"""
    found = script({**gpu, "IPA_CACHE": str(cache)}, text, tiny_bundle)
    assert found == "text_kv: tensorrt 11.0.0.1 does not accept the plan: magic tag does not match"


def test_without_a_driver_it_is_said_in_one_line(cache: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = ("--bundle", tiny_bundle, "--output", tmp_path / "x.png", "--engine", "tensorrt-rtx", *REQUEST)
    done = run(dict(os.environ), cache, *arguments)
    assert done.returncode == 2
    assert "no NVIDIA driver here (libcuda.so.1 cannot be loaded); `--engine auto` takes one that can" in done.stderr
    assert done.stderr.count("\n") == 1
