"""Image to image and inpainting against diffusers' own pipelines, with an adapter and without.

Tolerances as in test_fidelity.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import made_once
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from parity import assert_same_latents
from PIL import Image

from ipa.engines.errors import RequestError
from ipa.export.adapters import AdapterFile
from ipa.export.build import ExportRequest, export_bundle
from ipa.export.validate import Validator
from ipa.runtime import Pipeline, Request

SCHEDULERS = {"ddim": DDIMScheduler, "pndm": PNDMScheduler, "euler-ancestral": EulerAncestralDiscreteScheduler}
WITHOUT = {"image": None, "ip_adapter_scale": None}


def picture(seed: int, width: int = 72, height: int = 64) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BILINEAR)


def hole(width: int = 72, height: int = 64) -> Image.Image:
    mask = np.zeros((height, width, 3), np.uint8)
    mask[10:50, 20:60] = 255
    return Image.fromarray(mask)


@pytest.fixture(scope="module")
def inpainting_base(session_folder: Path, tiny_base: Path) -> Path:
    """The tiny pipeline with a UNet that takes nine channels."""

    def make(folder: Path) -> None:
        shutil.copytree(tiny_base, folder)
        config = json.loads((folder / "unet" / "config.json").read_text())
        torch.manual_seed(4)
        UNet2DConditionModel.from_config({**config, "in_channels": 9}).save_pretrained(folder / "unet")

    return made_once(session_folder, "tiny_inpainting", make)


@pytest.fixture(scope="module")
def inpainting_bundle(session_folder: Path, inpainting_base: Path, tiny_adapter_file: Path) -> Path:
    adapters = (AdapterFile("tiny", tiny_adapter_file),)
    return made_once(
        session_folder,
        "tiny_inpainting_bundle",
        lambda output: export_bundle(ExportRequest(str(inpainting_base), output, adapters=adapters)),
    )


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_bundle, engine="onnxruntime") as pipe:
        yield pipe


def run_diffusers(kind: Any, base: Path, adapter: Path, request: Request, **fields: Any) -> Any:
    pipe = kind.from_pretrained(base, local_files_only=True, safety_checker=None)
    if request.image is not None:
        pipe.load_ip_adapter(str(adapter.parent), subfolder="", weight_name=adapter.name, image_encoder_folder=None)
        pipe.set_ip_adapter_scale(request.ip_adapter_scale)
        fields["ip_adapter_image"] = request.image
    pipe.scheduler = SCHEDULERS[str(request.scheduler)].from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        image=request.init_image,
        strength=request.strength,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        num_images_per_prompt=request.num_images,
        eta=request.eta,
        generator=torch.Generator().manual_seed(int(request.seed or 0)),
        output_type="latent",
        **fields,
    ).images.numpy()


def make_request(**fields: Any) -> Request:
    defaults: dict[str, Any] = {
        "prompt": "a cat",
        "negative_prompt": "red dog",
        "image": picture(1),
        "init_image": picture(2),
        "ip_adapter_scale": 0.8,
        "num_inference_steps": 5,
        "guidance_scale": 5.0,
        "scheduler": "ddim",
        "seed": 6,
    }
    return Request(**{**defaults, **fields})


def last_latents(pipeline: Pipeline, request: Request) -> Any:
    *_, step = pipeline.steps(request)
    return step.latents


@pytest.mark.parametrize(
    ("scheduler", "strength", "fields"),
    [
        ("ddim", 0.8, {"num_images": 2, "eta": 0.5}),
        ("ddim", 0.3, {"guidance_scale": 1.0}),
        ("pndm", 0.6, {}),
        ("euler-ancestral", 0.7, {}),
        ("ddim", 1.0, {}),
        ("ddim", 0.6, WITHOUT),
        ("ddim", 0.6, {"prompt": "", "negative_prompt": ""}),
    ],
)
def test_image_to_image(
    pipeline: Pipeline,
    tiny_base: Path,
    tiny_adapter_file: Path,
    scheduler: str,
    strength: float,
    fields: dict[str, Any],
) -> None:
    request = make_request(scheduler=scheduler, strength=strength, **fields)
    expected = run_diffusers(StableDiffusionImg2ImgPipeline, tiny_base, tiny_adapter_file, request)
    assert_same_latents(last_latents(pipeline, request), expected)


@pytest.mark.parametrize(
    ("scheduler", "strength", "photo", "size", "fields"),
    [
        ("ddim", 1.0, (72, 64), (72, 64), {"eta": 0.5}),
        ("ddim", 0.6, (103, 70), (96, 64), {"num_images": 2}),  # rounded down to whole latents
        ("euler-ancestral", 1.0, (72, 64), (64, 80), {"height": 80, "width": 64}),  # stretched, with its mask
        ("ddim", 0.7, (72, 64), (72, 64), WITHOUT),
    ],
)
def test_inpainting_with_an_ordinary_model(
    pipeline: Pipeline,
    tiny_base: Path,
    tiny_adapter_file: Path,
    scheduler: str,
    strength: float,
    photo: tuple[int, int],
    size: tuple[int, int],
    fields: dict[str, Any],
) -> None:
    task = {"init_image": picture(2, *photo), "mask_image": hole(*photo), "strength": strength}
    request = make_request(scheduler=scheduler, **task, **fields)
    given = {"mask_image": request.mask_image, "width": size[0], "height": size[1]}
    expected = run_diffusers(StableDiffusionInpaintPipeline, tiny_base, tiny_adapter_file, request, **given)
    assert_same_latents(last_latents(pipeline, request), expected)


@pytest.mark.parametrize(("strength", "fields"), [(1.0, {"eta": 0.5}), (0.6, {}), (0.7, WITHOUT)])
def test_inpainting_with_an_inpainting_model(
    inpainting_bundle: Path, inpainting_base: Path, tiny_adapter_file: Path, strength: float, fields: dict[str, Any]
) -> None:
    request = make_request(strength=strength, mask_image=hole(), num_images=2, **fields)
    size = {"mask_image": hole(), "height": 64, "width": 72}
    expected = run_diffusers(StableDiffusionInpaintPipeline, inpainting_base, tiny_adapter_file, request, **size)
    with Pipeline.open(inpainting_bundle, engine="onnxruntime") as pipe:
        assert_same_latents(last_latents(pipe, request), expected)
        with pytest.raises(RequestError, match=r"an inpainting model.*--mask-image"):
            pipe.run(make_request())


def test_what_the_mask_leaves_out_stays(pipeline: Pipeline) -> None:
    """Outside the mask the last latents are those of the picture, whatever is drawn inside."""
    one = last_latents(pipeline, make_request(mask_image=hole(), prompt="a cat"))
    other = last_latents(pipeline, make_request(mask_image=hole(), prompt="a red dog"))
    outside = np.asarray(hole().convert("L"))[::8, ::8] == 0
    np.testing.assert_array_equal(one[..., outside], other[..., outside])
    assert np.abs(one - other).max() > 1e-3


def test_the_size_is_the_picture_s(pipeline: Pipeline) -> None:
    assert pipeline.run(make_request(init_image=picture(2, 77, 70))).images[0].size == (72, 64)
    assert pipeline.run(make_request(height=80, width=64)).images[0].size == (64, 80)


def test_a_batch_of_pictures_to_start_from(pipeline: Pipeline) -> None:
    requests = [make_request(init_image=picture(seed), mask_image=hole(), strength=0.7, seed=seed) for seed in (2, 3)]
    together = pipeline.run_batch(requests)
    for request, result in zip(requests, together, strict=True):
        alone = np.asarray(pipeline.run(request).images[0], int)
        assert np.abs(np.asarray(result.images[0], int) - alone).max() <= 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": 0.0}, "strength is 0.0, expected more than 0"),
        ({"strength": 1.5}, "strength is 1.5"),
        ({"strength": 0.1}, "leaves none"),
        ({"init_image": None, "mask_image": hole()}, "mask_image says what to do with a picture: add --init-image"),
        ({"init_image": None, "strength": 0.5}, "strength says"),
        ({"mask_image": hole(64, 20)}, "same ratio"),
        ({"init_image": "missing.png"}, r"missing\.png"),
    ],
)
def test_bad_tasks(pipeline: Pipeline, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipeline.run(make_request(**fields))


def test_an_inpainting_bundle_validates(
    inpainting_bundle: Path, inpainting_base: Path, tiny_adapter_file: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(inpainting_bundle, tmp_path / "bundle"))
    adapters = [AdapterFile("tiny", tiny_adapter_file)]
    checks = list(Validator(bundle, str(inpainting_base), None, adapters).run())
    assert [check.name for check in checks if not check.passed] == []
