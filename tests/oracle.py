"""diffusers' side of a comparison: its UNet with an adapter loaded by its own loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ipa.trainer.weights import load_adapter


def diffusers_unet(base: Path, adapter: Path) -> Any:
    """diffusers' own model with the adapter loaded by diffusers' own loader."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet").eval().requires_grad_(False)
    groups: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in load_adapter(adapter).items():
        group, name = key.split(".", 1)
        groups[group][name] = value
    unet._load_ip_adapter_weights([groups], low_cpu_mem_usage=False)
    return unet


def diffusers_noise(unet: Any, sample: Any, timestep: float, text: Any, embeds: Any, scale: float) -> torch.Tensor:
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [scale]
    added = {"image_embeds": [embeds[:, None]]}
    with torch.no_grad():
        return unet(sample, timestep, text, added_cond_kwargs=added).sample
