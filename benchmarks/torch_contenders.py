"""PyTorch's side of a speed run: diffusers' pipelines at full strength, eager and compiled.

Imported in the contender's own process.
"""

from __future__ import annotations

import atexit
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ipa.benchmarks.contender import Setting, encoded_pictures
from ipa.benchmarks.diffusers_pipeline import DiffusersPipeline
from ipa.engines.machine import available_cores
from ipa.export.quiet import quiet_libraries


class _EnoughSteps(Exception):  # noqa: N818  not an error
    """Ends a pipeline's loop after the steps that are timed."""


class TorchPipeline:
    """diffusers' loop with its own IP-Adapter.

    The first steps of a whole run are timed, from the first call of a model in the loop to the end of the last of
    them. Prompt and image are encoded before; adapter and attention to the image are part of each step, as they are in
    diffusers.
    """

    def __init__(
        self,
        base: str,
        adapter: str | None,
        setting: Mapping[str, Any],
        image_encoder: str | None = None,
        controlnet: str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        is_compiled: bool = False,
    ) -> None:
        """Load, and compile if wanted.

        Args:
            base, adapter, image_encoder, controlnet, device, dtype: see `DiffusersPipeline`.
            is_compiled: pass UNet, ControlNet and the VAE's decoder through `torch.compile`, weights frozen on a CPU.
        """
        quiet_libraries()
        torch.set_num_threads(available_cores())
        self.dtype, self._setting = dtype, Setting(**setting)
        self._theirs = DiffusersPipeline(
            Path(base),
            None if adapter is None else Path(adapter),
            image_encoder=None if image_encoder is None else Path(image_encoder),
            controlnet=None if controlnet is None else Path(controlnet),
            device=device,
            dtype=dtype,
        )
        pipe = self._theirs.pipe
        self._is_cuda = self._theirs.device.type == "cuda"
        torch.backends.cudnn.benchmark = self._is_cuda  # the fastest convolutions, found in the warm-up
        if is_compiled:
            _compile(pipe, device)
        self._request = self._setting.request()
        self.stages = self._make_stages()
        self._start = 0.0
        self._events: list[Any] = []
        for name in ("unet", "controlnet"):
            if (model := getattr(pipe, name, None)) is not None:
                model.register_forward_pre_hook(self._before)

    def block(self) -> tuple[float, float | None]:
        """See `Contender`."""
        self._start, self._events = 0.0, []
        last = self._setting.block_steps - 1

        def on_step_end(index: int) -> None:
            if index == last:
                raise _EnoughSteps

        with suppress(_EnoughSteps):
            self._theirs.call(self._request, on_step_end, output_type="latent", **self._encoded)
        if not self._is_cuda:
            return time.perf_counter() - self._start, None
        end = _recorded_event()
        torch.cuda.synchronize()
        return time.perf_counter() - self._start, self._events[0].elapsed_time(end) / 1e3

    def _before(self, model: Any, arguments: Any) -> None:
        """Before each call of a model: the clock starts with the first one."""
        if self._start:
            return
        if self._is_cuda:
            torch.cuda.synchronize()
            self._events.append(_recorded_event())
        self._start = time.perf_counter()

    @cached_property
    @torch.inference_mode()
    def _encoded(self) -> dict[str, Any]:
        """Prompt and image, encoded as the pipeline itself does it, so that blocks need not."""
        pipe, guided = self._theirs.pipe, self._setting.guidance_scale > 1
        request, device = self._request, self._theirs.device
        encoded = pipe.encode_prompt(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
        )
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        embeds: dict[str, Any] = {"prompt": None, "negative_prompt": None, **dict(zip(names, encoded, strict=False))}
        if self._theirs.has_adapter:
            images = pipe.prepare_ip_adapter_image_embeds(request.image, None, device, 1, guided)
            embeds |= {"ip_adapter_image": None, "ip_adapter_image_embeds": images}
        return embeds

    def _make_stages(self) -> dict[str, Callable[[], object]]:
        pipe, setting, device = self._theirs.pipe, self._setting, self._theirs.device
        like = {"device": device, "dtype": pipe.unet.dtype}
        side = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        if hasattr(pipe, "text_encoder_2") and pipe.vae.config.force_upcast and pipe.vae.dtype == torch.float16:
            pipe.vae.to(torch.float32)  # as the pipeline of Stable Diffusion XL does before it uses it
        latents_size = (pipe.vae.config.latent_channels, setting.height // side, setting.width // side)
        latents = torch.randn(setting.images, *latents_size, **like)
        image = torch.randn(1, 3, setting.height, setting.width, **like)
        request = self._request

        def text() -> None:
            for encoder, tokenizer in self._text_encoders():
                given = tokenizer(
                    [request.negative_prompt, request.prompt],
                    padding="max_length",
                    max_length=tokenizer.model_max_length,
                    return_tensors="pt",
                )
                encoder(given.input_ids.to(device), output_hidden_states=True)

        stages: dict[str, Callable[[], object]] = {"text": text}
        if self._theirs.has_adapter:
            size = pipe.image_encoder.config.image_size
            pixels = torch.randn(1, 3, size, size, **like)
            stages["image"] = lambda: pipe.image_encoder(pixels)
        if setting.task in ("img2img", "inpaint"):
            times = encoded_pictures(setting.task, pipe.unet.config.in_channels)
            stages["vae_encoder"] = lambda: [pipe.vae.encode(image.to(pipe.vae.dtype)) for _ in range(times)]
        stages["vae_decoder"] = lambda: pipe.vae.decode(latents.to(pipe.vae.dtype))
        return {name: self._waited_for(stage) for name, stage in stages.items()}

    def _text_encoders(self) -> list[tuple[Any, Any]]:
        pipe = self._theirs.pipe
        pairs = ((getattr(pipe, f"text_encoder{n}", None), getattr(pipe, f"tokenizer{n}", None)) for n in ("", "_2"))
        return [(encoder, tokenizer) for encoder, tokenizer in pairs if encoder is not None]

    def _waited_for(self, stage: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            with torch.inference_mode():
                stage()
            if self._is_cuda:
                torch.cuda.synchronize()

        return run


def _recorded_event() -> Any:
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _compile(pipe: Any, device: str) -> None:
    """UNet, ControlNet and the VAE's decoder compiled in place; on a GPU with tuning and CUDA graphs."""
    folder = tempfile.TemporaryDirectory(prefix="inductor-")  # with an earlier run's, the first call would be short
    atexit.register(folder.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
    if device == "cpu":
        import torch._inductor.config

        torch._inductor.config.freezing = True
    mode = "max-autotune" if device == "cuda" else None
    for model in (getattr(pipe, "unet", None), getattr(pipe, "controlnet", None), pipe.vae.decoder):
        if model is not None:
            model.forward = torch.compile(model.forward, mode=mode)  # hooks stay outside
