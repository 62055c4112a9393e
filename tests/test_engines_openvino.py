"""The OpenVINO back-end against onnxruntime: bfloat16 has 8 bits of mantissa, float32 components agree closely."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ipa.engines.bundle import Bundle
from ipa.engines.openvino_engine import OpenVinoEngine, has_bfloat16
from ipa.export.cases import cases
from ipa.runtime import Pipeline, Request
from ipa.runtime.demo import demo_bundle

STEPS = 20
MIN_PSNR = 35.0
BF16_ERROR, F32_ERROR = 0.05, 1e-4  # largest difference, relative to the output's range


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (60, 90, 3), np.uint8))


def psnr(first: Image.Image, second: Image.Image) -> float:
    error = np.mean((np.asarray(first, float) - np.asarray(second, float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


@pytest.mark.parametrize(
    "component", ["text_encoder", "text_kv", "image_encoder", "ip_adapter/tiny", "unet", "vae_decoder", "vae_encoder"]
)
def test_every_component_agrees_with_onnxruntime(tiny_bundle: Path, component: str) -> None:
    bundle = Bundle.open(tiny_bundle, verify=False)
    with (
        bundle.open_component(component, "onnxruntime") as reference,
        bundle.open_component(component, "openvino") as engine,
    ):
        assert isinstance(engine, OpenVinoEngine)
        limit = BF16_ERROR if engine.precision == "bfloat16" else F32_ERROR
        for case, inputs in cases(engine.spec, 8, 500):
            expected, found = reference(**inputs), engine(**inputs)
            for name, array in expected.items():
                difference = np.abs(found[name] - array).max() / np.ptp(array)
                assert difference <= limit, f"{case}: {name}"
                assert found[name].dtype == array.dtype


def test_bfloat16_is_for_what_takes_the_time(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle, verify=False)
    for component, is_half in (("unet", has_bfloat16()), ("text_encoder", False)):
        with bundle.open_component(component, "openvino") as engine:
            assert isinstance(engine, OpenVinoEngine)
            assert engine.precision == ("bfloat16" if is_half else "float32")


def test_whole_runs_keep_35_db(image: Image.Image) -> None:
    """The demo model, trained and exported in FP16: a random model's pictures are noise and say little."""
    with (
        Pipeline.open(demo_bundle(), engine="onnxruntime") as reference,
        Pipeline.open(demo_bundle(), engine="openvino") as ours,
    ):
        for seed in range(3):
            request = Request(prompt="a star", image=image, seed=seed, num_inference_steps=STEPS)
            assert psnr(reference.run(request).images[0], ours.run(request).images[0]) >= MIN_PSNR


def test_scale_0_is_the_base_model_exactly(tiny_bundle: Path, image: Image.Image) -> None:
    with Pipeline.open(tiny_bundle, engine="openvino") as pipeline:
        fields = {"prompt": "a cat", "seed": 0, "num_inference_steps": 3, "height": 64, "width": 72}
        *_, with_image = pipeline.steps(Request(image=image, ip_adapter_scale=0.0, **fields))
        *_, without = pipeline.steps(Request(**fields))
    np.testing.assert_array_equal(with_image.latents, without.latents)


def test_sizes_may_change_from_call_to_call(tiny_bundle: Path) -> None:
    with Bundle.open(tiny_bundle, verify=False).open_component("vae_decoder", "openvino") as engine:
        for height, width in ((8, 8), (9, 25), (8, 8)):
            latents = np.zeros((1, 4, height, width), np.float32)
            assert engine(latents=latents)["image"].shape == (1, 3, 8 * height, 8 * width)


def test_outputs_belong_to_the_caller(tiny_bundle: Path) -> None:
    with Bundle.open(tiny_bundle, verify=False).open_component("vae_decoder", "openvino") as engine:
        first = engine(latents=np.zeros((1, 4, 8, 8), np.float32))["image"]
        kept = first.copy()
        engine(latents=np.ones((1, 4, 8, 8), np.float32))
    np.testing.assert_array_equal(first, kept)


SIGNAL_AFTER_CLOSING = """
import signal, sys
from pathlib import Path
import numpy as np
from ipa.engines.bundle import Bundle

bundle = Bundle.open(Path(sys.argv[1]), verify=False)
first, second = (bundle.open_component("vae_decoder", "openvino") for _ in range(2))
for engine in (first, second):
    engine(latents=np.zeros((1, 4, 8, 8), np.float32))
first.close()
del first
second.close()
del second, engine
signal.signal(signal.SIGINT, lambda *_: print("alive"))
signal.raise_signal(signal.SIGINT)
"""


def test_signals_arrive_after_engines_were_closed_in_any_order(tiny_bundle: Path) -> None:
    command = [sys.executable, "-c", SIGNAL_AFTER_CLOSING, str(tiny_bundle)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "alive\n"), result.stderr
