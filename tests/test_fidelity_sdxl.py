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
from diffusers import (
    StableDiffusionXLPipeline,
)
from parity import assert_same_latents
from transformers import CLIPTokenizer
from xl_oracle import (
    SIZES,
    last_latents,
    make_request,
    opened,
    picture,
    relative_error,
    run_diffusers,
)

from ipa.engines.errors import RequestError
from ipa.runtime import Pipeline, Request
from ipa.runtime.block_scales import PRESETS
from ipa.runtime.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def oracles(tiny_xl_base: Path, tiny_xl_files: dict[str, Path]) -> dict[str, Any]:
    return {name: opened(StableDiffusionXLPipeline, tiny_xl_base, file) for name, file in tiny_xl_files.items()}


@pytest.fixture(scope="module")
def pipeline(tiny_xl_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_xl_bundle, engine="onnxruntime") as pipe:
        yield pipe


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
