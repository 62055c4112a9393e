"""`ipa-doctor`: every engine with its state, and the command that helps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from ipa.engines import registry, tensorrt_library
from ipa.engines.cuda_driver import Driver, Gpu, NoDriver, find_driver
from ipa.engines.errors import EngineError
from ipa.engines.plan_cache import PlanCache
from ipa.engines.plan_file import PlanKey
from ipa.runtime import doctor


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IPA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """As if these modules were not installed."""
    found = registry.find_spec
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name in modules else found(name))


def states(report: doctor.Report) -> dict[str, str]:
    return {engine.name: engine.state for engine in report.engines}


def test_every_engine_of_this_machine(cache: Path) -> None:
    result = CliRunner().invoke(doctor.main, [])
    assert result.exit_code == 0, result.output
    for text in (
        "openvino         ready",
        "onnxruntime      ready",
        "tensorrt-rtx     builds",
        "--engine auto: openvino (",
        f"engine cache {cache}:",
    ):
        assert text in result.stdout
    assert not cache.exists(), "looking makes nothing"


def test_json_is_the_same_report() -> None:
    report = json.loads(CliRunner().invoke(doctor.main, ["--format", "json"]).stdout)
    assert {engine["name"] for engine in report["engines"]} == {
        "openvino",
        "onnxruntime",
        "onnxruntime-cuda",
        "tensorrt",
        "tensorrt-rtx",
    }
    assert report["cores"] >= 1
    assert report["auto"].startswith("openvino (")


def test_a_missing_engine_has_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "openvino")
    report = doctor.examine()
    assert states(report)["openvino"] == "missing"
    assert report.auto.startswith("onnxruntime (")
    assert report.advice == ("faster pictures: `pip install 'ipa-runtime[openvino]'`",)


def test_no_engine_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "openvino", "onnxruntime")
    result = CliRunner().invoke(doctor.main, [])
    assert result.exit_code == 1
    assert "--engine auto: no engine is installed: run `pip install 'ipa-runtime[onnxruntime]'`" in result.stdout


def test_an_engine_that_does_not_load_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = [
        replace(backend, modules=("json.tool.nothing",)) if backend.name == "openvino" else backend
        for backend in registry.BACKENDS
    ]
    monkeypatch.setattr(doctor, "BACKENDS", backends)
    monkeypatch.setattr(registry, "find_spec", lambda name: object())
    report = doctor.examine()
    assert states(report)["openvino"] == "broken"
    assert "openvino does not load: `pip install 'ipa-runtime[openvino]'`" in report.advice


def test_nothing_that_is_broken_stops_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise RuntimeError("no such device")

    monkeypatch.setattr("ipa.engines.openvino_engine.has_bfloat16", broken)
    assert doctor.examine().bfloat16 is None


def test_two_distributions_of_one_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "has_distribution", lambda name: name in ("onnxruntime", "onnxruntime-gpu"))
    assert "these overwrite each other's files: onnxruntime onnxruntime-gpu" in doctor.as_text(doctor.examine())


def with_gpu(monkeypatch: pytest.MonkeyPatch, gpu: Gpu, cuda: tuple[int, int] = (13, 0)) -> str:
    """The page on a machine with this GPU."""
    for module in (doctor, registry):
        monkeypatch.setattr(module, "find_driver", lambda: Driver(cuda, (gpu,)))
    return doctor.as_text(doctor.examine())


def test_a_gpu_and_the_tensorrt_for_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    l4 = Gpu("NVIDIA L4", "8.9", 24 * 2**30)
    for cuda, extra in (((12, 8), "trt-cu12"), ((13, 0), "trt-cu13")):
        text = with_gpu(monkeypatch, l4, cuda)
        assert f"GPU: NVIDIA L4, compute capability 8.9, 24 GiB, CUDA {cuda[0]}.{cuda[1]}" in text
        assert f"`pip install 'ipa-runtime[{extra}]'`" in text
        assert "tensorrt-rtx     ready" in text
        assert "advice: faster pictures: `ipa-export build-engines --bundle DIR --engine tensorrt-rtx`" in text
        assert "not tensorrt-rtx: its engines are built for each bundle" in text
    without(monkeypatch, "tensorrt_rtx")
    assert "advice: faster pictures: `pip install 'ipa-runtime[trt-cu13]'`" in with_gpu(monkeypatch, l4)


def test_auto_passes_over_a_broken_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(engine: str) -> None:
        raise EngineError(f"the engine '{engine}' cannot be loaded: libnvinfer.so.10")

    for module in (doctor, tensorrt_library):
        monkeypatch.setattr(module, "load_library", broken)
    text = with_gpu(monkeypatch, Gpu("NVIDIA L4", "8.9", 24 * 2**30))
    assert "tensorrt-rtx     broken   the engine 'tensorrt-rtx' cannot be loaded: libnvinfer.so.10" in text
    assert "--engine auto: openvino (" in text


def test_a_gpu_that_tensorrt_rtx_does_not_list(monkeypatch: pytest.MonkeyPatch) -> None:
    text = with_gpu(monkeypatch, Gpu("NVIDIA H200", "9.0", 141 * 2**30))
    assert "tensorrt-rtx     builds" in text
    assert "it does not list compute capability 9.0" in text
    assert "--engine auto: openvino (" in text
    assert "advice: faster pictures: `pip install 'ipa-runtime[trt-cu13]'`" in text


@pytest.mark.skipif(not isinstance(find_driver(), NoDriver), reason="there is a GPU")
def test_no_driver_is_said() -> None:
    assert "GPU: no NVIDIA driver here" in doctor.as_text(doctor.examine())


def test_engines_in_the_cache_are_counted(cache: Path) -> None:
    key = PlanKey("unet", "a" * 64, "float16", "tensorrt-rtx", "1.7", "8.6", "", "linux-x86_64", "1")
    plans = PlanCache(cache)
    with plans.workspace() as folder:
        (folder / "plan").write_bytes(bytes(2**20))
        plans.store(key, folder / "plan", cache, {}, 1.0, 1.0)
    assert "1 engines, 1.0 MiB" in doctor.as_text(doctor.examine())
    cache.chmod(0o755)
    assert "chmod 700" in doctor.as_text(doctor.examine())
