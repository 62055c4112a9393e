"""Our torch-free chain against diffusers' `StableDiffusionPipeline` with `load_ip_adapter`, in FP32.

Both start from the same weights, image, prompt and seed. What differs is the order of float32 sums (onnxruntime's
kernels against torch's), some 1e-6 per call of the UNet, which guidance and the steps amplify; 1e-3 of the latents'
range is the promise, and what is seen is some 1e-5. A pixel may round to the neighbouring value: 2 of 255.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from parity import assert_same_latents
from PIL import Image

from ipa.runtime import Pipeline, Request
from ipa.runtime.schedulers import SCHEDULER_NAMES

STEPS = 5
PROMPT, NEGATIVE = "a photo of a cat, on the grass", "red dog"
SIZES = ((64, 64), (72, 104))
COUNTS = (1, 3)
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "pndm": (PNDMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-ancestral": (EulerAncestralDiscreteScheduler, {}),
    "dpm++-2m": (DPMSolverMultistepScheduler, {"use_karras_sigmas": False}),
    "dpm++-2m-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
}
CASES = [
    (scheduler, guidance, scale, SIZES[(i // 2) % 2], COUNTS[i % 2])
    for i, (scheduler, guidance, scale) in enumerate(product(("ddim", "pndm"), (1.0, 6.0), (0.0, 0.6, 1.3)))
]


@pytest.fixture(scope="module")
def oracle(tiny_base: Path, tiny_adapter_file: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True)
    pipe.load_ip_adapter(
        str(tiny_adapter_file.parent), subfolder="", weight_name=tiny_adapter_file.name, image_encoder_folder=None
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_bundle, engine="onnxruntime") as pipe:
        yield pipe


@pytest.fixture(scope="module")
def reference_image() -> Image.Image:
    ramp = np.linspace(0, 255, 90 * 60 * 3).reshape(60, 90, 3)
    noise = np.random.default_rng(3).integers(0, 90, (60, 90, 3))
    return Image.fromarray(((ramp + noise) % 256).astype(np.uint8))


def run_diffusers(oracle: Any, image: Image.Image | None, request: Request, output_type: str) -> Any:
    kind, options = SCHEDULERS[str(request.scheduler)]
    # From the file each time: the configuration of a live scheduler has kept options of those that it went through.
    oracle.scheduler = kind.from_pretrained(oracle.name_or_path, subfolder="scheduler", **options)
    if image is not None:
        oracle.set_ip_adapter_scale(request.ip_adapter_scale)
    assert request.seed is not None
    return oracle(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        ip_adapter_image=image,
        num_images_per_prompt=request.num_images,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        guidance_rescale=request.guidance_rescale,
        height=request.height,
        width=request.width,
        eta=request.eta,
        generator=torch.Generator().manual_seed(request.seed),
        output_type=output_type,
    ).images


def last_latents(pipeline: Pipeline, request: Request) -> np.ndarray:
    for step in pipeline.steps(request):
        latents = step.latents
    return latents


def make_request(image: Image.Image | None, **fields: Any) -> Request:
    defaults: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "image": image,
        "num_inference_steps": STEPS,
        "guidance_scale": 6.0,
        "ip_adapter_scale": 0.8,
        "seed": 11,
        "height": 64,
        "width": 64,
        "scheduler": "ddim",
    }
    return Request(**{**defaults, **fields})


@pytest.mark.parametrize(("scheduler", "guidance", "scale", "size", "count"), CASES)
def test_latents_equal_diffusers(
    oracle: Any,
    pipeline: Pipeline,
    reference_image: Image.Image,
    scheduler: str,
    guidance: float,
    scale: float,
    size: tuple[int, int],
    count: int,
) -> None:
    request = make_request(
        reference_image,
        scheduler=scheduler,
        guidance_scale=guidance,
        ip_adapter_scale=scale,
        height=size[0],
        width=size[1],
        num_images=count,
    )
    assert_same_latents(last_latents(pipeline, request), run_diffusers(oracle, reference_image, request, "latent"))


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS.keys() - {"ddim", "pndm"}))
def test_latents_of_every_scheduler_equal_diffusers(
    oracle: Any, pipeline: Pipeline, reference_image: Image.Image, scheduler: str
) -> None:
    """With adapter and guidance, two pictures from one generator, as each scheduler draws its noise."""
    request = make_request(reference_image, scheduler=scheduler, num_images=2)
    assert_same_latents(last_latents(pipeline, request), run_diffusers(oracle, reference_image, request, "latent"))


def test_every_scheduler_is_compared() -> None:
    assert tuple(SCHEDULERS) == SCHEDULER_NAMES


def test_without_an_image_prompt(tiny_base: Path, pipeline: Pipeline) -> None:
    plain = StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True)
    plain.set_progress_bar_config(disable=True)
    request = make_request(None, ip_adapter_scale=None)
    assert_same_latents(last_latents(pipeline, request), run_diffusers(plain, None, request, "latent"))


def test_from_the_image_prompt_alone(oracle: Any, pipeline: Pipeline, reference_image: Image.Image) -> None:
    request = make_request(reference_image, prompt="", negative_prompt="", ip_adapter_scale=1.0)
    assert_same_latents(last_latents(pipeline, request), run_diffusers(oracle, reference_image, request, "latent"))


def test_guidance_rescale(oracle: Any, pipeline: Pipeline, reference_image: Image.Image) -> None:
    request = make_request(reference_image, guidance_scale=12.0, guidance_rescale=0.7, num_images=2)
    assert_same_latents(last_latents(pipeline, request), run_diffusers(oracle, reference_image, request, "latent"))


@pytest.mark.parametrize("seed", [0, 2**32, 2**64 - 1])
def test_every_seed_is_torch_s(oracle: Any, pipeline: Pipeline, reference_image: Image.Image, seed: int) -> None:
    request = make_request(reference_image, seed=seed, num_inference_steps=2)
    assert_same_latents(last_latents(pipeline, request), run_diffusers(oracle, reference_image, request, "latent"))


def test_eta_draws_the_same_variance_noise(oracle: Any, pipeline: Pipeline, reference_image: Image.Image) -> None:
    request = make_request(reference_image, eta=0.7, num_images=2)
    assert_same_latents(last_latents(pipeline, request), run_diffusers(oracle, reference_image, request, "latent"))


@pytest.mark.parametrize("scheduler", ["ddim", "pndm"])
def test_pictures_equal_diffusers(
    oracle: Any, pipeline: Pipeline, reference_image: Image.Image, scheduler: str
) -> None:
    request = make_request(reference_image, scheduler=scheduler, num_images=3, height=96, width=64)
    ours = pipeline.run(request).images
    theirs = run_diffusers(oracle, reference_image, request, "pil")
    assert [image.size for image in ours] == [(64, 96)] * 3
    for mine, other in zip(ours, theirs, strict=True):
        difference = np.abs(np.asarray(mine, int) - np.asarray(other, int))
        assert difference.max() <= 2


def test_scale_0_is_the_base_model_exactly(pipeline: Pipeline, reference_image: Image.Image) -> None:
    with_image = make_request(reference_image, ip_adapter_scale=0.0)
    without = make_request(None, ip_adapter_scale=0.0)
    np.testing.assert_array_equal(last_latents(pipeline, with_image), last_latents(pipeline, without))


def test_a_step_of_the_batch_alone_is_the_same_picture(pipeline: Pipeline, reference_image: Image.Image) -> None:
    fields = {"num_images": 3, "eta": 0.5, "num_inference_steps": 3}
    batch = last_latents(pipeline, make_request(reference_image, **fields))
    alone = last_latents(pipeline, make_request(reference_image, only=1, **fields))
    # The same sums in kernels tiled for another batch size.
    np.testing.assert_allclose(alone[0], batch[1], rtol=1e-4, atol=1e-4)


def test_the_same_request_gives_the_same_bits(pipeline: Pipeline, reference_image: Image.Image) -> None:
    request = make_request(reference_image)
    np.testing.assert_array_equal(last_latents(pipeline, request), last_latents(pipeline, request))


def test_engines_that_close_after_their_stage_give_the_same_bits(
    tiny_bundle: Path, pipeline: Pipeline, reference_image: Image.Image
) -> None:
    request = Request(prompt="a cat", image=reference_image, seed=2, num_inference_steps=2, height=64, width=64)
    with Pipeline.open(tiny_bundle, engine="onnxruntime", keep_engines=False) as frugal:
        for _ in range(2):
            result = frugal.run(request)
            assert not frugal._engines
            np.testing.assert_array_equal(result.images[0], pipeline.run(request).images[0])
    assert list(result.seconds) == ["load", "text", "image", "beginning", "denoise", "vae_decoder"]
    assert result.seconds["load"] > 0
