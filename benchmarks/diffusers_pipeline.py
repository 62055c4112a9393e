"""What everything is compared with: diffusers' own pipelines with `load_ip_adapter`, given our requests."""

from __future__ import annotations

import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ControlNetModel,
    SchedulerMixin,
)
from PIL import Image
from transformers import CLIPImageProcessorPil

from ipa.engines.errors import IpaError
from ipa.engines.scheduler_names import SCHEDULER_CLASSES
from ipa.export.image_encoder import load_image_encoder, read_image_config
from ipa.export.source import Source
from ipa.runtime.image_files import open_image
from ipa.runtime.request import Request

KARRAS = "-karras"
NEUTRAL_AT_ZERO = ("guidance_rescale", "eta")
# What diffusers adds to the model: a checker that paints pictures black, marks in the pixels. Bundles have neither.
_XL_OPTIONS: dict[str, Any] = {"add_watermarker": False}
_OPTIONS: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
_IMAGE_ENCODER, _PREPROCESSOR = "image_encoder", "preprocessor_config.json"
StepEnd = Callable[[int], None]


class DiffusersPipeline:
    """A base model with one IP-Adapter, and perhaps one ControlNet, at full strength.

    Its attention is PyTorch's fused kernel, its weights lie channels last, in half precision on a GPU.

    Attributes:
        pipe: from text to image; the others share its parts.
    """

    def __init__(
        self,
        base: Path,
        adapter: Path | None,
        *,
        image_encoder: Path | None = None,
        controlnet: Path | None = None,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        """Load from folders and files on this machine.

        Args:
            base: pipeline folder in diffusers format.
            adapter: IP-Adapter file.
            image_encoder: the adapter's, a folder; `None`: `image_encoder/` of the pipeline.
            controlnet: ControlNet folder in diffusers format.
            device, dtype: of PyTorch.
        Raises:
            IpaError: diffusers cannot load one of them.
        """
        self.device, self._dtype, self._base = torch.device(device), getattr(torch, dtype), base
        options: dict[str, Any] = {"torch_dtype": self._dtype, "local_files_only": True}
        parts: dict[str, Any] = {}
        try:
            if adapter is not None:
                source = Source(str(image_encoder_folder(base, image_encoder)))
                config = read_image_config(source, "")  # of a whole CLIP model, too
                parts["image_encoder"] = load_image_encoder(source, "", config).to(self._dtype)
                parts["feature_extractor"] = _image_processor(base, image_encoder, config["image_size"])
            if controlnet is not None:
                parts["controlnet"] = ControlNetModel.from_pretrained(controlnet, **options)
            index = json.loads((base / "model_index.json").read_text("utf-8"))
            self._own = _XL_OPTIONS if "XL" in index["_class_name"] else _OPTIONS
            self.pipe = AutoPipelineForText2Image.from_pretrained(base, **options, **parts, **self._own)
            if adapter is not None:
                self.pipe.load_ip_adapter(
                    str(adapter.parent), subfolder="", weight_name=adapter.name, image_encoder_folder=None
                )
            self.pipe.to(self.device)
        except Exception as error:  # diffusers raises anything, of a missing folder up to a GPU that is too small
            raise IpaError(
                f"diffusers cannot load {base} with adapter {adapter} and ControlNet {controlnet}: {error}"
            ) from error
        self.has_adapter, self.has_controlnet = adapter is not None, controlnet is not None
        for name in ("unet", "vae", "controlnet"):
            if (part := getattr(self.pipe, name, None)) is not None:
                part.to(memory_format=torch.channels_last)
        self.pipe.set_progress_bar_config(disable=True)

    def draw(self, request: Request) -> list[Image.Image]:
        """Pictures of a resolved request."""
        images: list[Image.Image] = self.call(request).images
        return images

    @torch.inference_mode()
    def call(self, request: Request, on_step_end: StepEnd | None = None, **more: Any) -> Any:
        """Call the pipeline that a request needs.

        Args:
            request: resolved; one image prompt at most, one control image at most.
            on_step_end: given the index of each step that is done.
            **more: in place of what the request says, such as `prompt_embeds` or `output_type`.
        """
        pipe, given = self._task(request)
        pipe.scheduler = self._scheduler(request)
        assert request.seed is not None
        given |= {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt or None,
            "num_images_per_prompt": request.num_images,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "guidance_rescale": request.guidance_rescale,
            "eta": request.eta,
            "generator": torch.Generator().manual_seed(request.seed),
        }
        if request.all_image_prompts:
            (prompt,) = request.all_image_prompts
            given["ip_adapter_image"] = open_image(prompt.images[0])
            pipe.set_ip_adapter_scale(prompt.scale)
        elif self.has_adapter:  # it cannot go without an image; at scale 0 it is the base model exactly
            given["ip_adapter_image"] = Image.new("RGB", (64, 64))
            pipe.set_ip_adapter_scale(0.0)
        if on_step_end is not None:

            def callback(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
                on_step_end(index)
                return kwargs

            given["callback_on_step_end"] = callback
        known = signature(pipe.__call__).parameters
        for name in NEUTRAL_AT_ZERO:  # not every pipeline has them
            if not given[name]:
                del given[name]
        if missing := given.keys() - known.keys():
            raise IpaError(f"{type(pipe).__name__} of diffusers takes no {', '.join(sorted(missing))}: leave it out")
        given |= more
        return pipe(**{name: value for name, value in given.items() if value is not None})

    def _task(self, request: Request) -> tuple[Any, dict[str, Any]]:
        """The pipeline of a request's kind, with the arguments that only it takes."""
        control = {} if not request.controls else self._control(request)
        size = {"height": request.height, "width": request.width}
        if request.init_image is None:
            named = {"image": control.pop("control_image")} if control else {}
            return self.pipe, {**named, **control, **size}
        start = {"image": open_image(request.init_image), "strength": request.strength, **control}
        if request.mask_image is None:
            return AutoPipelineForImage2Image.from_pipe(self.pipe, **self._own), start
        mask = open_image(request.mask_image)
        return AutoPipelineForInpainting.from_pipe(self.pipe, **self._own), {**start, "mask_image": mask, **size}

    def _control(self, request: Request) -> dict[str, Any]:
        (control,) = request.controls
        return {
            "control_image": open_image(control.image),
            "controlnet_conditioning_scale": float(control.scale),
            "control_guidance_start": control.start,
            "control_guidance_end": control.end,
            "guess_mode": request.guess_mode,
        }

    def _scheduler(self, request: Request) -> Any:
        """From its file each time: a live one's configuration keeps options of those that it went through."""
        import diffusers

        name = str(request.scheduler)
        plain = name.removesuffix(KARRAS)
        kind = next(cls for cls, ours in SCHEDULER_CLASSES.items() if ours == plain)
        options: dict[str, Any] = {"use_karras_sigmas": name.endswith(KARRAS)} if plain.startswith("dpm") else {}
        made: SchedulerMixin = getattr(diffusers, kind).from_pretrained(self._base, subfolder="scheduler", **options)
        return made


def image_encoder_folder(base: Path, image_encoder: Path | None) -> Path:
    """Where the image encoder is: named apart, or in the pipeline."""
    return image_encoder or base / _IMAGE_ENCODER


def _image_processor(base: Path, image_encoder: Path | None, size: int) -> Any:
    """The image encoder's own, else the pipeline's, else CLIP's for pictures of that size.

    Always Pillow's: where torchvision is installed, transformers' plain name stands for another that rounds otherwise.
    """
    own, pipelines = image_encoder_folder(base, image_encoder), base / "feature_extractor"
    if (own / _PREPROCESSOR).exists():
        return CLIPImageProcessorPil.from_pretrained(own)
    if (pipelines / _PREPROCESSOR).exists():
        theirs = CLIPImageProcessorPil.from_pretrained(pipelines)
        # With an image encoder named apart, the pipeline's is that of its safety checker: right if the size is.
        if image_encoder is None or theirs.size.get("shortest_edge") == size:
            return theirs
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
