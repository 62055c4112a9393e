"""One request with image prompts: final latents of our pipeline and of diffusers'."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image

from ipa.runtime import ImagePrompt, Pipeline, Request

STEPS = 4
SIDE = 64


def ours(pipeline: Pipeline, *prompts: ImagePrompt, size: tuple[int, int] = (SIDE, SIDE), images: int = 1) -> Any:
    request = Request(
        prompt="a cat",
        negative_prompt="red dog",
        image_prompts=prompts,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        seed=3,
        height=size[1],
        width=size[0],
        scheduler="ddim",
        num_images=images,
    )
    for step in pipeline.steps(request):
        latents = step.latents
    return latents


def theirs(
    oracle: Any,
    images: list[Any],
    scales: Any,
    masks: list[Any] | None = None,
    size: tuple[int, int] = (SIDE, SIDE),
    count: int = 1,
    callback: Any = None,
) -> Any:
    oracle.set_ip_adapter_scale(scales)
    extra: dict[str, Any] = {}
    if masks is not None:
        extra["cross_attention_kwargs"] = {"ip_adapter_masks": masks}
    return oracle(
        prompt="a cat",
        negative_prompt="red dog",
        ip_adapter_image=images,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        height=size[1],
        width=size[0],
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        num_images_per_prompt=count,
        callback_on_step_end=callback,
        **extra,
    ).images.numpy()


def preprocessed(masks: list[Image.Image], size: tuple[int, int] = (SIDE, SIDE)) -> Any:
    tensor = IPAdapterMaskProcessor().preprocess(masks, height=size[1], width=size[0])
    return tensor.reshape(1, len(masks), size[1], size[0])
