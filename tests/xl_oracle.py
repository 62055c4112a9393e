"""diffusers' Stable Diffusion XL pipelines, and ours beside them: what comparisons are made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
)
from parity import TOLERANCE
from PIL import Image

from ipa.runtime import Pipeline, Request
from ipa.runtime.block_scales import PRESETS

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
