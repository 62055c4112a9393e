"""Stable Diffusion XL: image to image and inpainting against diffusers' pipelines, with an adapter and without.

Tolerances as in test_fidelity.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from parity import assert_same_latents
from xl_oracle import (
    NEGATIVE,
    SIZES,
    assert_adapter_counts,
    hole,
    last_latents,
    make_request,
    opened,
    picture,
    relative_error,
    run_diffusers,
)

from ipa.engines.bundle import Bundle
from ipa.runtime import Pipeline

WITHOUT = {"image": None, "adapter": None, "ip_adapter_scale": None}


@pytest.fixture(scope="module")
def pipeline(tiny_xl_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_xl_bundle, engine="onnxruntime") as pipe:
        yield pipe


@pytest.mark.parametrize(("strength", "fields"), [(0.6, {}), (1.0, {}), (0.7, WITHOUT)])
def test_image_to_image(
    pipeline: Pipeline, tiny_xl_base: Path, tiny_xl_files: dict[str, Path], strength: float, fields: dict[str, Any]
) -> None:
    request = make_request(init_image=picture(2), strength=strength, height=None, width=None, **SIZES, **fields)
    oracle = opened(StableDiffusionXLImg2ImgPipeline, tiny_xl_base, tiny_xl_files["base"] if request.image else None)
    expected = run_diffusers(oracle, request, image=request.init_image, strength=strength)
    found = last_latents(pipeline, request)
    assert_same_latents(found, expected)
    if request.image:
        assert_adapter_counts(pipeline, request, found)


@pytest.mark.parametrize(("strength", "fields"), [(0.6, {}), (1.0, {}), (0.7, WITHOUT)])
def test_inpainting(
    pipeline: Pipeline, tiny_xl_base: Path, tiny_xl_files: dict[str, Path], strength: float, fields: dict[str, Any]
) -> None:
    size = {"height": 64, "width": 72}
    request = make_request(init_image=picture(2), mask_image=hole(), strength=strength, num_images=2, **size, **fields)
    oracle = opened(StableDiffusionXLInpaintPipeline, tiny_xl_base, tiny_xl_files["base"] if request.image else None)
    picture_fields = {"image": request.init_image, "mask_image": hole(), "strength": strength}
    expected = run_diffusers(oracle, request, height=64, width=72, **picture_fields)
    found = last_latents(pipeline, request)
    assert_same_latents(found, expected)
    if request.image:
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
