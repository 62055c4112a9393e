"""The frozen models that an adapter is trained beside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipa.trainer.errors import TrainError

LATENT_CHANNELS = 4


@dataclass(frozen=True)
class BaseModel:
    """A Stable Diffusion pipeline and an image encoder, all frozen.

    Attributes:
        unet: ``UNet2DConditionModel``, float32.
        vae, text_encoder, image_encoder: encoders, in the precision that ``freeze`` gave them.
        tokenizer: of the text encoder.
        image_processor: from a PIL image to the image encoder's ``pixel_values``.
        noise_scheduler: ``DDPMScheduler`` with the base's own configuration.
    """

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    image_encoder: Any
    image_processor: Any
    noise_scheduler: Any

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent pixel, 8 in Stable Diffusion."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def text_length(self) -> int:
        """Tokens of every caption after padding, 77 in Stable Diffusion."""
        return int(self.text_encoder.config.max_position_embeddings)

    @property
    def image_embed_dim(self) -> int:
        """Width of ``image_embeds``."""
        return int(self.image_encoder.config.projection_dim)

    def freeze(self, device: torch.device, encoder_dtype: torch.dtype) -> None:
        """Move everything to the device, without gradients; the encoders in their own precision."""
        self.unet.requires_grad_(False).eval().to(device)
        for encoder in (self.vae, self.text_encoder, self.image_encoder):
            encoder.requires_grad_(False).eval().to(device, dtype=encoder_dtype)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the unscaled latents, float32, of pixels (batch, 3, H, W) in [-1, 1]."""
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> Tensor:
        """Text states (batch, text_length, cross_attention_dim), float32; long captions are cut."""
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=self.text_length, truncation=True, return_tensors="pt"
        )
        return self.text_encoder(tokens.input_ids.to(self.text_encoder.device))[0].float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode_references(self, pixel_values: Tensor) -> Tensor:
        """``image_embeds`` (batch, image_embed_dim), float32."""
        encoder = self.image_encoder
        return encoder(pixel_values.to(encoder.device, encoder.dtype)).image_embeds.float()  # type: ignore[no-any-return]


def load_base(base: str, image_encoder: str) -> BaseModel:
    """Load the parts of a diffusers pipeline and an image encoder, each a folder or a hub id.

    Raises:
        TrainError: a part is missing or of another family than Stable Diffusion 1.x/2.x.
    """
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    unet = _load(diffusers.UNet2DConditionModel, base, "unet")
    if unet.config.addition_embed_type is not None or unet.config.in_channels != LATENT_CHANNELS:
        raise TrainError(
            f"--base {base}: its UNet is not of the plain Stable Diffusion 1.x/2.x family (SDXL and inpainting models "
            "take other inputs); give a text-to-image base model of that family"
        )
    scheduler = _load(diffusers.DDPMScheduler, base, "scheduler")
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise TrainError(
            f"--base {base}: prediction type {scheduler.config.prediction_type!r} is not supported, "
            "expected epsilon or v_prediction"
        )
    encoder = _load(transformers.CLIPVisionModelWithProjection, image_encoder, None)
    return BaseModel(
        unet=unet,
        vae=_load(diffusers.AutoencoderKL, base, "vae"),
        text_encoder=_load(transformers.CLIPTextModel, base, "text_encoder"),
        tokenizer=_load(transformers.CLIPTokenizer, base, "tokenizer"),
        image_encoder=encoder,
        image_processor=_image_processor(image_encoder, encoder.config.image_size),
        noise_scheduler=scheduler,
    )


def _image_processor(image_encoder: str, image_size: int) -> Any:
    """A local encoder's own preprocessing where it has one, else CLIP's at the encoder's size, as diffusers does."""
    from transformers import CLIPImageProcessorPil

    if (Path(image_encoder) / "preprocessor_config.json").is_file():
        return _load(CLIPImageProcessorPil, image_encoder, None)
    return CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=image_size)


def _load(kind: Any, source: str, subfolder: str | None) -> Any:
    place = source if subfolder is None else f"{source}, part {subfolder}"
    if Path(source).is_absolute() and not (Path(source) / (subfolder or "")).is_dir():
        raise TrainError(f"cannot load {place}: no such folder")
    load: Callable[..., Any] = kind.from_pretrained
    try:
        return load(source) if subfolder is None else load(source, subfolder=subfolder)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise TrainError(f"cannot load {place} as {kind.__name__}: {reason}") from error
