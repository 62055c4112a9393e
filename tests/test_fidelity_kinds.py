"""Every kind of IP-Adapter against diffusers' `StableDiffusionPipeline` with `load_ip_adapter`, in FP32.

One bundle, one UNet graph, an adapter of each kind. The promise and its reasons are those of `test_fidelity`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from parity import assert_same_latents
from PIL import Image
from test_fidelity import last_latents, make_request, run_diffusers

from ipa.engines.bundle import hash_file
from ipa.export.checks import TOLERANCES
from ipa.runtime import ImagePrompt, Pipeline, Request

NAMES = {"base": "tiny", "plus": "plus", "full-face": "full-face"}  # of the bundle's adapters, by kind
KINDS = tuple(NAMES)


@pytest.fixture(scope="module")
def oracles(tiny_base: Path, tiny_kind_files: dict[str, Path]) -> dict[str, Any]:
    """diffusers' pipelines with their own adapters, by kind."""
    pipes = {}
    for kind, file in tiny_kind_files.items():
        pipe = StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True)
        pipe.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None)
        pipe.set_progress_bar_config(disable=True)
        pipes[kind] = pipe
    return pipes


@pytest.fixture(scope="module")
def pipeline(tiny_kinds_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_kinds_bundle, engine="onnxruntime") as pipe:
        yield pipe


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    ramp = np.linspace(0, 255, 90 * 60 * 3).reshape(60, 90, 3)
    noise = np.random.default_rng(3).integers(0, 90, (60, 90, 3))
    return Image.fromarray(((ramp + noise) % 256).astype(np.uint8))


def test_one_unet_graph_serves_all(tiny_bundle: Path, tiny_kinds_bundle: Path, pipeline: Pipeline) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        assert hash_file(tiny_kinds_bundle / "unet" / name) == hash_file(tiny_bundle / "unet" / name)
    records = pipeline.manifest.adapters
    found = {record.kind: (name, record.tokens, record.feature, record.negative) for name, record in records.items()}
    assert found == {
        "base": ("tiny", 4, "image_embeds", "zeros"),
        "plus": ("plus", 16, "hidden_states", "zero-pixels"),
        "full-face": ("full-face", 37, "hidden_states", "zero-pixels"),
    }


def test_embeds_of_unlike_tokens_share_no_batch(pipeline: Pipeline) -> None:
    """What a file holds is read later; how many tokens an adapter makes of an image is known."""
    requests = [Request(image_prompts=(ImagePrompt(adapter=name, embeds="x"),)) for name in NAMES.values()]
    assert len({pipeline.batch_key(request) for request in requests}) == len(requests)


@pytest.mark.parametrize("scale", [0.7, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_equal_diffusers(
    oracles: dict[str, Any], pipeline: Pipeline, picture: Image.Image, kind: str, scale: float
) -> None:
    request = make_request(picture, adapter=NAMES[kind], ip_adapter_scale=scale)
    found, expected = last_latents(pipeline, request), run_diffusers(oracles[kind], picture, request, "latent")
    assert_same_latents(found, expected)
    without = last_latents(pipeline, make_request(None, ip_adapter_scale=0.0))
    assert np.abs(found - without).max() > 0.05 * np.abs(without).max(), "the adapter does something"


@pytest.mark.parametrize("kind", ["plus", "full-face"])
def test_a_negative_half_of_zeros_would_be_seen(
    oracles: dict[str, Any], tiny_kinds_bundle: Path, picture: Image.Image, kind: str, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_kinds_bundle, tmp_path / "bundle"))
    manifest = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(manifest.replace('"zero-pixels"', '"zeros"'))
    request = make_request(picture, adapter=NAMES[kind])
    with Pipeline.open(bundle, engine="onnxruntime") as pipe:
        found = last_latents(pipe, request)
    with pytest.raises(AssertionError, match="relative error"):
        assert_same_latents(found, run_diffusers(oracles[kind], picture, request, "latent"))


@pytest.mark.parametrize("kind", KINDS)
def test_without_guidance_and_in_batches(
    oracles: dict[str, Any], pipeline: Pipeline, picture: Image.Image, kind: str
) -> None:
    request = make_request(picture, adapter=NAMES[kind], guidance_scale=1.0, num_images=2, height=72, width=104)
    assert_same_latents(last_latents(pipeline, request), run_diffusers(oracles[kind], picture, request, "latent"))


@pytest.mark.parametrize("kind", KINDS)
def test_scale_0_is_the_base_model_exactly(pipeline: Pipeline, picture: Image.Image, kind: str) -> None:
    found = last_latents(pipeline, make_request(picture, adapter=NAMES[kind], ip_adapter_scale=0.0))
    np.testing.assert_array_equal(found, last_latents(pipeline, make_request(None, ip_adapter_scale=0.0)))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays_near(
    oracles: dict[str, Any], tiny_kinds_half_bundle: Path, picture: Image.Image, kind: str
) -> None:
    """Guidance g adds errors of both halves, g and g - 1 times; a negative half of zeros would be 1.9 off."""
    request = make_request(picture, adapter=NAMES[kind], guidance_scale=6.0)
    expected = run_diffusers(oracles[kind], picture, request, "latent").numpy()
    with Pipeline.open(tiny_kinds_half_bundle, engine="onnxruntime", keep_engines=False) as pipe:
        found = last_latents(pipe, request)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() / np.abs(expected).max() < (6 + 5) * TOLERANCES["float16"]
