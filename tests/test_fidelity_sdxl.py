"""Our torch-free chain for Stable Diffusion XL against diffusers' pipelines with `load_ip_adapter`, in FP32.

Tolerances as in test_fidelity.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from parity import TOLERANCE, assert_same_latents
from PIL import Image
from transformers import CLIPTokenizer

from ipa.engines.bundle import Bundle
from ipa.engines.errors import RequestError
from ipa.runtime import Pipeline, Request
from ipa.runtime.block_scales import PRESETS
from ipa.runtime.tokenizer import Tokenizer

STEPS = 5
PROMPT, NEGATIVE = "a photo of a cat, on the grass!", "red dog"
SCHEDULERS: dict[str, Any] = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}
SIZES = {"original_size": (96, 200), "crops_coords_top_left": (8, 24), "target_size": (128, 72)}


def picture(seed: int, width: int = 72, height: int = 64) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BILINEAR)


def hole() -> Image.Image:
    mask = np.zeros((64, 72, 3), np.uint8)
    mask[10:50, 20:60] = 255
    return Image.fromarray(mask)


def opened(kind: Any, base: Path, adapter: Path | None) -> Any:
    pipe = kind.from_pretrained(base, local_files_only=True, add_watermarker=False)
    if adapter is not None:
        pipe.load_ip_adapter(str(adapter.parent), subfolder="", weight_name=adapter.name, image_encoder_folder=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def oracles(tiny_xl_base: Path, tiny_xl_files: dict[str, Path]) -> dict[str, Any]:
    return {name: opened(StableDiffusionXLPipeline, tiny_xl_base, file) for name, file in tiny_xl_files.items()}


@pytest.fixture(scope="module")
def pipeline(tiny_xl_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_xl_bundle, engine="onnxruntime") as pipe:
        yield pipe


def run_diffusers(oracle: Any, request: Request, output_type: str = "latent", **fields: Any) -> Any:
    """diffusers' picture for a request; its negative prompt is `None` where ours is empty."""
    kind = SCHEDULERS[str(request.scheduler)]
    oracle.scheduler = kind.from_pretrained(oracle.name_or_path, subfolder="scheduler")
    if request.ip_adapter_scale is not None:
        scale = request.ip_adapter_scale
        oracle.set_ip_adapter_scale(PRESETS[scale] if isinstance(scale, str) else scale)
        fields["ip_adapter_image"] = request.image
    sizes = {name: getattr(request, name) for name in SIZES if getattr(request, name) is not None}
    assert request.seed is not None
    return oracle(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt or None,
        num_images_per_prompt=request.num_images,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        eta=request.eta,
        generator=torch.Generator().manual_seed(request.seed),
        output_type=output_type,
        **sizes,
        **fields,
    ).images


def make_request(**fields: Any) -> Request:
    defaults: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "image": picture(1),
        "adapter": "base",
        "num_inference_steps": STEPS,
        "guidance_scale": 5.0,
        "ip_adapter_scale": 0.8,
        "seed": 11,
        "height": 64,
        "width": 64,
        "scheduler": "euler",
    }
    return Request(**{**defaults, **fields})


def last_latents(pipeline: Pipeline, request: Request) -> np.ndarray:
    for step in pipeline.steps(request):
        latents = step.latents
    return latents


def relative_error(ours: np.ndarray, theirs: Any) -> float:
    expected = np.asarray(theirs)
    assert ours.shape == expected.shape
    assert ours.dtype == np.float32
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


def assert_adapter_counts(pipeline: Pipeline, request: Request, found: np.ndarray) -> None:
    """What the comparison with diffusers would not see: an image prompt that moves less than the tolerance."""
    moved = relative_error(last_latents(pipeline, replace(request, ip_adapter_scale=0.0)), found)
    print(f"moved by the image {moved:.1e}")
    assert moved > 5 * TOLERANCE


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"negative_prompt": ""},
        {"guidance_scale": 1.0},
        {"scheduler": "ddim", "height": 72, "width": 104, "num_images": 2},
        {"scheduler": "ddim", "guidance_scale": 1.0, "num_images": 2, **SIZES},
        {"height": 104, "width": 72, "num_images": 2, "negative_prompt": "", **SIZES},
        {"original_size": (300, 500)},
        {"crops_coords_top_left": (0, 64)},
        {"target_size": (40, 1024)},
        {"adapter": "plus", "num_images": 2},
        {"adapter": "plus", "scheduler": "ddim", "negative_prompt": "", "width": 96},
        {"prompt": "", "ip_adapter_scale": 1.0, "negative_prompt": ""},
    ],
    ids=str,
)
def test_latents_equal_diffusers(oracles: dict[str, Any], pipeline: Pipeline, fields: dict[str, Any]) -> None:
    request = make_request(**fields)
    size = {"height": request.height, "width": request.width}
    expected = run_diffusers(oracles[str(request.adapter)], request, **size)
    assert_same_latents(last_latents(pipeline, request), expected)


@pytest.mark.parametrize("name", sorted(SIZES))
def test_every_size_moves_the_picture(pipeline: Pipeline, name: str) -> None:
    """What the comparison above would not see: sizes that count for nothing."""
    plain = last_latents(pipeline, make_request())
    assert relative_error(last_latents(pipeline, make_request(**{name: SIZES[name]})), plain) > 1e-2


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_equal_diffusers(oracles: dict[str, Any], pipeline: Pipeline, preset: str) -> None:
    request = make_request(ip_adapter_scale=preset)
    expected = run_diffusers(oracles["base"], request, height=64, width=64)
    found = last_latents(pipeline, request)
    assert_same_latents(found, expected)
    assert relative_error(last_latents(pipeline, make_request(ip_adapter_scale=1.0)), found) > 1e-2


def test_pictures_equal_diffusers(oracles: dict[str, Any], pipeline: Pipeline) -> None:
    request = make_request(num_images=2, height=96)
    ours = pipeline.run(request).images
    theirs = run_diffusers(oracles["base"], request, "pil", height=96, width=64)
    for mine, other in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(mine, int) - np.asarray(other, int)).max() <= 2


def test_defaults_are_the_pipeline_s(oracles: dict[str, Any], pipeline: Pipeline, tiny_xl_base: Path) -> None:
    """Size of the UNet's configuration, guidance 5, Euler of the pipeline's own options."""
    request = make_request(height=None, width=None, guidance_scale=None, scheduler=None, num_inference_steps=3)
    result = pipeline.run(request)
    expected = replace(request, guidance_scale=5.0, scheduler="euler")
    theirs = run_diffusers(oracles["base"], expected, "pil")
    assert result.images[0].size == theirs[0].size == (128, 128)
    assert (result.request.scheduler, result.request.guidance_scale) == ("euler", 5.0)
    assert np.abs(np.asarray(result.images[0], int) - np.asarray(theirs[0], int)).max() <= 2


def test_scale_0_is_the_base_model_exactly(pipeline: Pipeline, tiny_xl_base: Path) -> None:
    without = make_request(image=None, adapter=None, ip_adapter_scale=None)
    found = last_latents(pipeline, without)
    np.testing.assert_array_equal(last_latents(pipeline, make_request(ip_adapter_scale=0.0)), found)
    plain = opened(StableDiffusionXLPipeline, tiny_xl_base, None)
    assert_same_latents(found, run_diffusers(plain, without, height=64, width=64))


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_image_to_image(
    pipeline: Pipeline, tiny_xl_base: Path, tiny_xl_files: dict[str, Path], strength: float
) -> None:
    request = make_request(init_image=picture(2), strength=strength, height=None, width=None, **SIZES)
    oracle = opened(StableDiffusionXLImg2ImgPipeline, tiny_xl_base, tiny_xl_files["base"])
    expected = run_diffusers(oracle, request, image=request.init_image, strength=strength)
    found = last_latents(pipeline, request)
    assert_same_latents(found, expected)
    assert_adapter_counts(pipeline, request, found)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting(pipeline: Pipeline, tiny_xl_base: Path, tiny_xl_files: dict[str, Path], strength: float) -> None:
    request = make_request(
        init_image=picture(2), mask_image=hole(), strength=strength, height=64, width=72, num_images=2
    )
    oracle = opened(StableDiffusionXLInpaintPipeline, tiny_xl_base, tiny_xl_files["base"])
    picture_fields = {"image": request.init_image, "mask_image": hole(), "strength": strength}
    expected = run_diffusers(oracle, request, height=64, width=72, **picture_fields)
    found = last_latents(pipeline, request)
    assert_same_latents(found, expected)
    assert_adapter_counts(pipeline, request, found)


@pytest.mark.parametrize(("strength", "negative_prompt"), [(0.6, NEGATIVE), (1.0, "")])
def test_inpainting_with_an_inpainting_model(
    tiny_xl_inpainting: tuple[Path, Path], tiny_xl_files: dict[str, Path], strength: float, negative_prompt: str
) -> None:
    """It also encodes empty negative prompts, where others of the family take zeros."""
    base, bundle = tiny_xl_inpainting
    begin = {"mask_image": hole(), "strength": strength, "height": 64, "width": 72}
    request = make_request(init_image=picture(2), num_images=2, negative_prompt=negative_prompt, **begin)
    oracle = opened(StableDiffusionXLInpaintPipeline, base, tiny_xl_files["base"])
    expected = run_diffusers(oracle, request, image=request.init_image, **begin)
    with Pipeline.open(bundle, engine="onnxruntime") as pipe:
        found = last_latents(pipe, request)
        assert_same_latents(found, expected)
        assert_adapter_counts(pipe, request, found)
        zeros = Bundle(pipe.bundle.root, replace(pipe.manifest, force_zeros_for_empty_prompt=True))
    with Pipeline(zeros, engine="onnxruntime") as other:
        assert (relative_error(last_latents(other, request), found) > 1e-2) == (not negative_prompt)


def test_a_batch_of_requests_with_other_texts_and_sizes(pipeline: Pipeline) -> None:
    requests = [
        make_request(seed=2, negative_prompt="", num_images=2),
        make_request(seed=3, prompt="a red dog", image=picture(4), **SIZES),
    ]
    assert len({pipeline.batch_key(request) for request in requests}) == 1
    for request, result in zip(requests, pipeline.run_batch(requests), strict=True):
        for mine, alone in zip(result.images, pipeline.run(request).images, strict=True):
            assert np.abs(np.asarray(mine, int) - np.asarray(alone, int)).max() <= 2


def test_repeated_text_is_encoded_once(
    pipeline: Pipeline, tiny_xl_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make_request(num_inference_steps=1, prompt="a house")
    first = pipeline.run(request).images[0]
    names: list[str] = []
    engine = pipeline._engines
    monkeypatch.setattr(pipeline._text, "_engine", lambda name: names.append(name) or engine(name))
    np.testing.assert_array_equal(pipeline.run(request).images[0], first)
    assert names == []
    pipeline.run(replace(request, negative_prompt=""))
    assert names == ["text_encoder", "text_encoder_2", "text_kv"]


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_each_tokenizer_gives_the_ids_of_the_pipeline(tiny_xl_bundle: Path, tiny_xl_base: Path, part: str) -> None:
    ours = Tokenizer.open(tiny_xl_bundle / part / "tokenizer.json", 77)
    theirs = CLIPTokenizer.from_pretrained(tiny_xl_base, subfolder=part)
    for text in ("", "a cat! on the grass!!", "a" * 100):
        expected = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
        np.testing.assert_array_equal(ours.encode(text).ids, expected)
    assert ours.encode("").ids[-1] == (0 if part == "tokenizer_2" else len(theirs) - 1)


def test_a_long_prompt_warns_once(pipeline: Pipeline) -> None:
    result = pipeline.run(make_request(prompt="cat " * 100, num_inference_steps=1))
    assert len(result.warnings) == 1


@pytest.mark.parametrize("name", sorted(SIZES))
def test_other_families_refuse_the_sizes(tiny_bundle: Path, name: str) -> None:
    with Pipeline.open(tiny_bundle, engine="onnxruntime") as pipe, pytest.raises(RequestError, match=f"{name} is for"):
        pipe.run(Request(prompt="a cat", **{name: SIZES[name]}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"original_size": (0, 5)}, r"original_size is 0, expected a whole number from 1"),
        ({"target_size": (5, 5, 5)}, r"target_size is \(5, 5, 5\), expected two whole numbers"),
        ({"crops_coords_top_left": (-1, 0)}, "crops_coords_top_left is -1"),
        ({"crops_coords_top_left": 7}, "expected two whole numbers"),
        ({"original_size": (1.5, True)}, "original_size is 1.5"),
    ],
)
def test_bad_sizes(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_request(**fields)


def test_sizes_of_a_json_record_are_tuples() -> None:
    record = json.loads(json.dumps(SIZES))
    assert make_request(**record) == make_request(image=make_request().image, **SIZES)
