"""What a run begins with: pure noise, a noised picture (image to image), or a picture with a part to fill (inpainting).

Random numbers come in diffusers' order: the picture's latents, the noise, the masked picture's latents, then what the
scheduler takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ipa.engines.engine import Engine
from ipa.runtime.masks import binary_mask, check_ratio
from ipa.runtime.noise import TorchGenerator
from ipa.runtime.request import Request
from ipa.runtime.schedulers import Schedule

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Frame:
    """The part of a picture that stays, for UNets that know nothing of it: it is put back after each step.

    Attributes:
        latents: (batch, channels, height, width) clean, of the whole picture.
        noise: as much, that the run began with.
        mask: (batch, 1, height, width), 1 where the picture is made anew.
    """

    latents: FloatArray
    noise: FloatArray
    mask: FloatArray

    def put_back(self, index: int, schedule: Schedule, latents: FloatArray) -> FloatArray:
        """The latents after step `index` with the frame at the same level of noise.

        Source: diffusers 0.42.1, pipeline_stable_diffusion_inpaint.py, the denoising loop.
        """
        is_last = index + 1 == len(schedule.timesteps)
        frame = self.latents if is_last else schedule.add_noise(index + 1, self.latents, self.noise)
        kept: FloatArray = (1 - self.mask) * frame + self.mask * latents
        return kept


@dataclass(frozen=True)
class Beginning:
    """Where the loop starts.

    Attributes:
        latents: (batch, channels, height, width).
        draw_noise: the next variance noise, shaped as they are.
        frame: what stays of a picture; `None`: nothing.
        channels: (batch, 1 + channels, height, width) that inpainting UNets take beside the latents: the mask, and the
            latents of the picture without what is behind it.
    """

    latents: FloatArray
    draw_noise: Callable[[], FloatArray]
    frame: Frame | None = None
    channels: FloatArray | None = None

    @classmethod
    def joined(cls, parts: Sequence[Beginning]) -> Beginning:
        """Those of several requests of one kind as one batch."""
        frames = [part.frame for part in parts if part.frame is not None]
        channels = [part.channels for part in parts if part.channels is not None]
        names = Frame.__dataclass_fields__ if frames else ()
        joined = {name: np.concatenate([getattr(frame, name) for frame in frames]) for name in names}
        return cls(
            np.concatenate([part.latents for part in parts]),
            lambda: np.concatenate([part.draw_noise() for part in parts]),
            Frame(**joined) if frames else None,
            np.concatenate(channels) if channels else None,
        )


class Beginner:
    """Makes the beginnings of one batch."""

    def __init__(self, vae_encoder: Callable[[], Engine], scaling_factor: float, downscale: int, is_inpainting: bool):
        """Take what the bundle says.

        Args:
            vae_encoder: opens the component; called only where there is a picture.
            is_inpainting: whether the UNet takes the mask and the masked picture.
        """
        self._vae_encoder, self._scaling_factor = vae_encoder, np.float32(scaling_factor)
        self._downscale, self._is_inpainting = downscale, is_inpainting

    def begin(
        self,
        request: Request,
        schedule: Schedule,
        shape: tuple[int, int, int],
        init_image: Image.Image | None,
        mask_image: Image.Image | None,
    ) -> Beginning:
        """The beginning of a request.

        Args:
            schedule: its run of the scheduler, from the strength's step on.
            shape: channels, height and width of the latents.
            init_image, mask_image: RGB pictures.
        Raises:
            RequestError: the mask has another ratio than the picture that it is of.
        """
        assert request.seed is not None and request.height and request.width
        generator, only = TorchGenerator(request.seed), request.only
        chosen = slice(None) if only is None else slice(only, only + 1)

        def draw_noise() -> FloatArray:
            return generator.randn((request.num_images, *shape))[chosen]

        sigma = np.float32(schedule.init_noise_sigma)
        if init_image is None:
            return Beginning(draw_noise() * sigma, draw_noise)
        size = request.height, request.width
        pixels = as_pixels(init_image, *size)
        is_pure_noise = mask_image is not None and request.strength == 1
        has_frame = mask_image is not None and not self._is_inpainting
        clean: FloatArray | None = None
        if has_frame or not is_pure_noise:
            clean = self._encode(pixels, generator)
        noise = draw_noise()
        if is_pure_noise or clean is None:
            latents = noise * sigma
        else:
            latents = schedule.add_noise(0, np.repeat(clean, len(noise), axis=0), noise)
        if mask_image is None:
            return Beginning(latents, draw_noise)
        # Both are stretched alike, whatever size is made of them.
        check_ratio("mask_image", mask_image, init_image.size)
        mask = binary_mask(mask_image, *size)[None, None]
        masked = self._encode(pixels * (mask < 0.5), generator)  # drawn in any case, as diffusers does
        small = np.repeat(mask[..., :: self._downscale, :: self._downscale], len(noise), axis=0)
        if self._is_inpainting:
            channels = np.concatenate([small, np.repeat(masked, len(noise), axis=0)], axis=1)
            return Beginning(latents, draw_noise, channels=channels)
        assert clean is not None
        return Beginning(latents, draw_noise, Frame(np.repeat(clean, len(noise), axis=0), noise, small))

    def _encode(self, pixels: FloatArray, generator: TorchGenerator) -> FloatArray:
        """Latents drawn from the encoder's distribution, (1, channels, height, width)."""
        encoder = self._vae_encoder()
        outputs = encoder(image=pixels.astype(encoder.spec.inputs[0].dtype))
        mean, logvar = (outputs[name].astype(np.float32) for name in ("latent_mean", "latent_logvar"))
        drawn: FloatArray = (
            mean + np.exp(np.float32(0.5) * logvar) * generator.randn(mean.shape)
        ) * self._scaling_factor
        return drawn


def as_pixels(image: Image.Image, height: int, width: int) -> FloatArray:
    """A picture as the VAE encoder takes it, (1, 3, height, width) from -1 to 1.

    Source: diffusers 0.42.1, image_processor.py, `VaeImageProcessor.preprocess`.
    """
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    pixels: FloatArray = np.asarray(resized, np.float32) / np.float32(255)
    return pixels.transpose(2, 0, 1)[None] * np.float32(2) - np.float32(1)
