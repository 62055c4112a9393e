"""The CUDA provider's engine. Without a GPU it takes the same way through onnxruntime with buffers on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from ipa.engines import onnxruntime_cuda_engine
from ipa.engines.bundle import Bundle
from ipa.engines.engine import GraphFile
from ipa.engines.errors import EngineError
from ipa.engines.onnxruntime_cuda_engine import OnnxRuntimeCudaEngine
from ipa.engines.onnxruntime_engine import OnnxRuntimeEngine

pytestmark = pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="there is a GPU: run `make gpu-check`"
)


def graph(root: Path, component: str) -> GraphFile:
    bundle = Bundle.open(root, verify=False)
    return GraphFile(component, bundle.manifest.components[component].spec, root / component / "model.onnx")


def unet_inputs(engine: OnnxRuntimeCudaEngine, side: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    kv = int(engine.spec.inputs[2].axes[-1])
    return {
        "sample": rng.standard_normal((2, 4, side, side), np.float32),
        "timestep": np.array(500, np.float32),
        "text_kv": rng.standard_normal((2, 77, kv), np.float32),
        "image_kv": rng.standard_normal((2, 4, kv), np.float32),
    }


def test_equals_the_cpu_engine_at_changing_shapes(tiny_bundle: Path) -> None:
    unet = graph(tiny_bundle, "unet")
    with OnnxRuntimeCudaEngine(unet, "cpu") as engine, OnnxRuntimeEngine(unet) as oracle:
        kept = []
        for seed, side in enumerate((8, 16, 16, 8)):
            inputs = unet_inputs(engine, side, seed)
            found = engine(**inputs)["noise_pred"]
            np.testing.assert_array_equal(found, oracle(**inputs)["noise_pred"])
            kept.append((found, found.copy()))
        for found, copy in kept:
            np.testing.assert_array_equal(found, copy, err_msg="a result was overwritten by a later call")


def test_each_set_of_shapes_has_a_cuda_graph_of_its_own(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []
    monkeypatch.setattr(
        ort.RunOptions, "add_run_config_entry", lambda self, name, value: graphs.append((name, value)), raising=True
    )
    with OnnxRuntimeCudaEngine(graph(tiny_bundle, "unet"), "cpu") as engine:
        assert not engine.is_captured
        engine.is_captured = True  # as on a GPU
        for side in (8, 16, 8, 24, 32, 40, 8, 16):
            engine(**unet_inputs(engine, side, 0))
    numbers = [1, 2, 1, 3, 4, 5, 1, 6]  # four are kept: 16 was forgotten, and its number is not used again
    assert graphs == [("gpu_graph_id", str(number)) for number in numbers]


def test_outputs_whose_shape_the_spec_does_not_tell(tiny_bundle: Path) -> None:
    decoder = graph(tiny_bundle, "vae_decoder")
    with OnnxRuntimeCudaEngine(decoder, "cpu") as engine, OnnxRuntimeEngine(decoder) as oracle:
        for side in (8, 12):
            latents = np.random.default_rng(side).standard_normal((1, 4, side, side), np.float32)
            image = engine(latents=latents)["image"]
            assert image.shape == (1, 3, 8 * side, 8 * side)
            np.testing.assert_array_equal(image, oracle(latents=latents)["image"])


def test_only_what_changes_is_copied(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    update = ort.OrtValue.update_inplace
    monkeypatch.setattr(
        ort.OrtValue, "update_inplace", lambda self, array: copied.append(array.shape) or update(self, array)
    )
    unet = graph(tiny_bundle, "unet")
    with OnnxRuntimeCudaEngine(unet, "cpu") as engine, OnnxRuntimeEngine(unet) as oracle:
        inputs = unet_inputs(engine, 8, 0)
        for name in ("text_kv", "image_kv"):
            inputs[name].flags.writeable = False
        engine(**inputs)
        assert len(copied) == 4
        copied.clear()
        inputs["sample"] = inputs["sample"] * 2
        found = engine(**inputs)["noise_pred"]
        assert sorted(copied) == [(), (2, 4, 8, 8)]
        np.testing.assert_array_equal(found, oracle(**inputs)["noise_pred"])
        writable = inputs["text_kv"].copy()
        for factor in (2, 3):  # the same array, changed in place
            writable *= factor
            inputs["text_kv"] = writable
            np.testing.assert_array_equal(engine(**inputs)["noise_pred"], oracle(**inputs)["noise_pred"])


def test_onnxruntime_without_cuda_does_not_fall_back_silently(tiny_bundle: Path) -> None:
    with pytest.raises(EngineError, match="onnxruntime has no working CUDAExecutionProvider"):
        OnnxRuntimeCudaEngine(graph(tiny_bundle, "unet"))


def test_the_graph_that_tries_the_gpu_is_one() -> None:
    session = onnxruntime_cuda_engine._session(onnxruntime_cuda_engine._PROBE, "cpu", False)
    assert session.run(None, {"x": np.array([3], np.float32)})[0] == 3
    assert "built without CUDA" in onnxruntime_cuda_engine.cuda_problem()


def test_a_closed_engine_says_so(tiny_bundle: Path) -> None:
    engine = OnnxRuntimeCudaEngine(graph(tiny_bundle, "text_kv"), "cpu")
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine(encoder_hidden_states=np.zeros((1, 77, 1), np.float32))
