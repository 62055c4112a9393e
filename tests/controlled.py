"""Requests with control images, and what diffusers' ControlNet pipelines make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    MultiControlNetModel,
    PNDMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image

from ipa.runtime import ControlImage, Request

SCHEDULERS = {"ddim": DDIMScheduler, "pndm": PNDMScheduler, "euler": EulerDiscreteScheduler}
# Of each family: from noise, from a picture, inpainting.
KINDS = {
    "sd15": (
        StableDiffusionControlNetPipeline,
        StableDiffusionControlNetImg2ImgPipeline,
        StableDiffusionControlNetInpaintPipeline,
    ),
    "sdxl": (
        StableDiffusionXLControlNetPipeline,
        StableDiffusionXLControlNetImg2ImgPipeline,
        StableDiffusionXLControlNetInpaintPipeline,
    ),
}
OPTIONS = {"sd15": {"safety_checker": None}, "sdxl": {"add_watermarker": False}}
SIZES = ("original_size", "crops_coords_top_left", "target_size")


def picture(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BILINEAR)


def hole() -> Image.Image:
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[10:50, 20:60] = 255
    return Image.fromarray(mask)


EDGES, POSE = ControlImage(picture(1), "edges"), ControlImage(picture(2), "pose", scale=0.6)
MOOD = ControlImage(picture(3), "mood")
IMAGE = {"image": picture(9), "ip_adapter_scale": 0.7}


def make_request(*controls: ControlImage, **fields: Any) -> Request:
    defaults: dict[str, Any] = {
        "prompt": "a photo of a cat",
        "negative_prompt": "red dog",
        "controls": controls,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "height": 64,
        "width": 64,
        "scheduler": "ddim",
        "seed": 3,
    }
    return Request(**{**defaults, **fields})


def last_latents(pipeline: Any, request: Request) -> Any:
    *_, step = pipeline.steps(request)
    return step.latents


@dataclass
class Oracle:
    """diffusers' ControlNet pipelines of one base model; each is loaded once."""

    family: str
    base: Path
    adapter: Path
    controlnets: Mapping[str, Path]
    _models: dict[str, Any] = field(default_factory=dict)
    _pipelines: dict[tuple[type, bool], Any] = field(default_factory=dict)

    def __call__(self, request: Request, **fields: Any) -> Any:
        """The final latents.

        Args:
            request: the names of its ControlNets are those of `controlnets`.
            fields: of the pipeline, what the request does not say.
        """
        nets = [self._model(str(control.name)) for control in request.controls]
        one = len(nets) == 1

        def each(values: Sequence[Any]) -> Any:
            return values[0] if one else list(values)

        pipe = self._pipeline(request)
        pipe.register_modules(controlnet=nets[0] if one else MultiControlNetModel(nets))
        pipe.scheduler = SCHEDULERS[str(request.scheduler)].from_pretrained(self.base, subfolder="scheduler")
        if request.image is not None:
            pipe.set_ip_adapter_scale(request.ip_adapter_scale)
            fields["ip_adapter_image"] = request.image
        pictures = each([control.image for control in request.controls])
        if request.init_image is None:
            fields["image"] = pictures
        else:
            fields |= {"image": request.init_image, "strength": request.strength, "control_image": pictures}
        if request.mask_image is not None:
            fields["mask_image"] = request.mask_image
        return pipe(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt or None,
            controlnet_conditioning_scale=each([control.scale for control in request.controls]),
            control_guidance_start=[control.start for control in request.controls],
            control_guidance_end=[control.end for control in request.controls],
            guess_mode=request.guess_mode,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            num_images_per_prompt=request.num_images,
            height=request.height,
            width=request.width,
            generator=torch.Generator().manual_seed(int(request.seed or 0)),
            output_type="latent",
            **{name: getattr(request, name) for name in SIZES if getattr(request, name) is not None},
            **fields,
        ).images.numpy()

    def _model(self, name: str) -> Any:
        if name not in self._models:
            self._models[name] = ControlNetModel.from_pretrained(self.controlnets[name], local_files_only=True)
        return self._models[name]

    def _pipeline(self, request: Request) -> Any:
        from_noise, from_picture, inpainting = KINDS[self.family]
        kind = inpainting if request.mask_image else from_picture if request.init_image else from_noise
        key = kind, request.image is not None
        if key not in self._pipelines:
            net = self._model(next(iter(self.controlnets)))
            pipe = kind.from_pretrained(self.base, controlnet=net, local_files_only=True, **OPTIONS[self.family])
            if request.image is not None:
                place = {"subfolder": "", "weight_name": self.adapter.name, "image_encoder_folder": None}
                pipe.load_ip_adapter(str(self.adapter.parent), **place)
            pipe.set_progress_bar_config(disable=True)
            self._pipelines[key] = pipe
        return self._pipelines[key]
