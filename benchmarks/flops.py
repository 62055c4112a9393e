"""How many operations a model takes, counted on shapes alone: 2 for each multiply-add."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

TEXT_TOKENS = 77
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder")
MICRO_CONDITIONS = 6  # numbers of Stable Diffusion XL's `time_ids`


def counted(call: Callable[[], object]) -> float:
    """Billions of operations of what `call` runs, on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return float(counter.get_total_flops()) / 1e9


def unet_gflop(config: dict[str, Any], batch: int, height: int, width: int) -> float:
    """A call of the UNet without image prompt; `height` and `width` of the latents."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        sample = torch.empty(batch, unet.config.in_channels, height, width)
        states = torch.empty(batch, TEXT_TOKENS, unet.config.cross_attention_dim)
        added: dict[str, torch.Tensor] = {}
        if unet.config.addition_embed_type == "text_time":
            ids = MICRO_CONDITIONS * unet.config.addition_time_embed_dim
            text_width = unet.config.projection_class_embeddings_input_dim - ids
            added = {"text_embeds": torch.empty(batch, text_width), "time_ids": torch.empty(batch, MICRO_CONDITIONS)}
        return counted(lambda: unet(sample, torch.empty(batch), states, added_cond_kwargs=added))


def unet_weights(base: Path) -> int:
    """How many weights a pipeline's UNet has: each is read once for a step, however large the batch."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(_config(base / "unet"))
        return sum(weight.numel() for weight in unet.parameters())


def vae_decoder_gflop(config: dict[str, Any], height: int, width: int) -> float:
    """Decoding one picture; `height` and `width` of the latents."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
        latents = torch.empty(1, vae.config.latent_channels, height, width)
        return counted(lambda: vae.decode(latents))


def image_encoder_gflop(config: dict[str, Any]) -> float:
    """Encoding one picture."""
    with torch.device("meta"):
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
        size = encoder.config.image_size
        pixels = torch.empty(1, 3, size, size)
        return counted(lambda: encoder(pixels))


def text_encoder_gflop(config: dict[str, Any]) -> float:
    """Encoding one prompt."""
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig(**config))
        ids = torch.empty(1, encoder.config.max_position_embeddings, dtype=torch.int64)
        return counted(lambda: encoder(ids))


def pipeline_gflop(base: Path, batch: int, height: int, width: int) -> dict[str, float]:
    """A call of each component of a pipeline folder: the UNet's whole batch, one picture and prompt of the others.

    Args:
        height, width: pixels.
    """
    configs = {name: config for name in PARTS if (config := _config(base / name)) is not None}
    side = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    counts = {
        "unet": unet_gflop(configs["unet"], batch, height // side, width // side),
        "vae_decoder": vae_decoder_gflop(configs["vae"], height // side, width // side),
    }
    counts |= {name: text_encoder_gflop(configs[name]) for name in PARTS[2:4] if name in configs}
    if "image_encoder" in configs:
        counts["image_encoder"] = image_encoder_gflop(configs["image_encoder"])
    return counts


def _config(folder: Path) -> dict[str, Any] | None:
    file = folder / "config.json"
    if not file.exists():
        return None
    config: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return config
