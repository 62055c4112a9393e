"""Whole denoising runs, each once with PyTorch and once with a bundle's engines, from the same noise and conditions.

The conditions are what the real encoders make of random token ids and a random picture, so their size is real. Small
differences of a step grow over a run: this is what a user sees of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from diffusers import DDIMScheduler

from ipa.engines.engine import Array, Engine
from ipa.engines.manifest import Manifest
from ipa.engines.spec import SDXL
from ipa.export.adapters import AdapterWeights
from ipa.export.oracle import DiffusersStep
from ipa.export.pipeline import BasePipeline
from ipa.export.source import reading

STEPS = 20
RUNS = 3  # from different noise: now and then a single one stands where the least rounding decides between two pictures
DISTURBANCE = 1e-3
LARGEST = 32  # latents a side: a full-size model needs minutes for this on a CPU already

StepFunction = Callable[[Mapping[str, Array]], Array]


class WholeRuns:
    """DDIM with guidance, one picture a run."""

    def __init__(self, manifest: Manifest, base: BasePipeline, largest: int | None = LARGEST) -> None:
        """Draw noise and conditions.

        Args:
            manifest: of the bundle, for its sizes and defaults.
            base: the PyTorch models.
            largest: side of the latents, `None` for the bundle's own size.
        """
        self._base = base
        self._defaults, self._scaling_factor = manifest.defaults, np.float32(manifest.vae.scaling_factor)
        self._dtype = manifest.components["unet"].dtype
        height, width = (
            min(size // manifest.vae.downscale, largest or size)
            for size in (self._defaults.height, self._defaults.width)
        )
        self.case = (
            f"median of {RUNS}: {STEPS} steps of DDIM, {height}x{width}, guidance {self._defaults.guidance_scale:g}"
        )
        random = np.random.default_rng(0)
        unet = manifest.components["unet"].spec
        taken, channels = int(unet.inputs[0].axes[1]), int(unet.outputs[0].axes[1])
        self._noise, self._other_noise = random.standard_normal((2, RUNS, channels, height, width), np.float32)
        # What an inpainting model takes beside the latents, none in others.
        self._channels = random.standard_normal((2, taken - channels, height, width), np.float32)
        with torch.no_grad():
            vocabulary = min(int(config["vocab_size"]) for config in base.text_configs.values())
            text = self._text(torch.from_numpy(random.integers(0, vocabulary, (2, manifest.text_tokens))))
            size = manifest.components["image_encoder"].spec.inputs[0].axes[-1]
            pixels = torch.from_numpy(random.standard_normal((1, 3, int(size), int(size)), np.float32))
            encoded = base.load_image_encoder()(
                torch.cat([torch.zeros_like(pixels), pixels]), output_hidden_states=True
            )
        embeds, hidden_states = encoded.image_embeds.numpy(), encoded.hidden_states[-2].numpy()
        # The negative half as adapters are given it: base ones get zeros, the others what zero pixels are encoded to.
        image_embeds = np.concatenate([np.zeros_like(embeds[:1]), embeds[1:]])
        self._conditions = {
            **text,
            "image_embeds": image_embeds,
            "hidden_states": hidden_states,
        }

    def _text(self, ids: torch.Tensor) -> dict[str, Array]:
        """What the family's text encoders make of negative and positive ids."""
        if self._base.family != SDXL:
            return {"encoder_hidden_states": self._base.load_text_encoder()(ids).last_hidden_state.numpy()}
        first = self._base.load_text_encoder()(ids, output_hidden_states=True).hidden_states[-2]
        second = self._base.load_text_encoder_2()(ids, output_hidden_states=True)
        size = [self._defaults.height, self._defaults.width]
        return {
            "encoder_hidden_states": torch.cat(
                [first, second.hidden_states[-(self._base.clip_skip + 2)]], dim=-1
            ).numpy(),
            "text_embeds": second.text_embeds.numpy(),
            "time_ids": np.array([[*size, 0, 0, *size]] * 2, np.float32),
        }

    def references(self, weights: AdapterWeights | None) -> list[tuple[Array, Array]]:
        """What diffusers' models make in float32: of each run the picture, and the one of noise slightly changed.

        Args:
            weights: of the adapter; `None`: the base model alone.
        Returns:
            Pairs of pictures, (3, height, width) in 0 to 1.
        """
        model, vae = DiffusersStep(self._base.load_unet(), weights), self._base.load_vae()

        disturbed = self._noise + np.float32(DISTURBANCE) * self._other_noise
        latents = self._denoise(lambda inputs: model(inputs, 1.0), np.concatenate([self._noise, disturbed]), "float32")
        with torch.no_grad():
            pictures = [_to_unit(vae.decode(torch.from_numpy(one[None])).sample.numpy()) for one in latents]
        return list(zip(pictures[:RUNS], pictures[RUNS:], strict=True))

    def with_engines(self, step: StepFunction, decoder: Engine) -> list[Array]:
        """The pictures that engines make, one a run; as `references`.

        Args:
            step: predicted noise for `sample`, `timestep`, `encoder_hidden_states` and the image features; for Stable
                Diffusion XL `text_embeds` and `time_ids`, too.
            decoder: opened component `vae_decoder`.
        """
        pictures = []
        for noise in np.split(self._noise, RUNS):  # one at a time: engines may be built for no more
            latents = self._denoise(step, noise, self._dtype).astype(decoder.spec.inputs[0].dtype)
            pictures.append(_to_unit(decoder(latents=latents)["image"].astype(np.float32)))
        return pictures

    def _denoise(self, step: StepFunction, noise: Array, dtype: str) -> Array:
        """The final latents of all noise, ready for the decoder."""
        scheduler = reference_scheduler(self._base)
        scheduler.set_timesteps(STEPS)
        latents = torch.from_numpy(noise)
        channels, *conditions = (
            np.repeat(array, len(noise), axis=0) for array in (self._channels, *self._conditions.values())
        )
        given = {
            name: array if name == "time_ids" else array.astype(dtype)
            for name, array in zip(self._conditions, conditions, strict=True)
        }
        for timestep in scheduler.timesteps:
            sample = np.concatenate([np.concatenate([latents.numpy()] * 2), channels], axis=1).astype(dtype)
            inputs = {"sample": sample, "timestep": np.asarray(timestep, np.float32), **given}
            negative, positive = np.split(step(inputs).astype(np.float32), 2)
            noise_pred = negative + np.float32(self._defaults.guidance_scale) * (positive - negative)
            latents = scheduler.step(torch.from_numpy(noise_pred), timestep, latents).prev_sample
        result: Array = latents.numpy() / self._scaling_factor
        return result


def reference_scheduler(base: BasePipeline) -> DDIMScheduler:
    """diffusers' DDIM, as the base model's scheduler is configured.

    Raises:
        IpaError: it does not know an option's value.
    """
    with reading(f"{base.source}/scheduler/scheduler_config.json"):
        return DDIMScheduler.from_config(base.scheduler_config)


def _to_unit(image: Array) -> Array:
    """(1, 3, height, width) in -1 to 1 as (3, height, width) in 0 to 1, clipped as pictures are."""
    unit: Array = np.clip(image[0] / 2 + 0.5, 0, 1)
    return unit
