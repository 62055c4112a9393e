"""The PyTorch side of validation: the base model and the adapter as diffusers computes them, nothing of our own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection

from ipa.engines.engine import Array
from ipa.export.adapters import AdapterWeights
from ipa.export.hoist import cross_attentions


class DiffusersStep:
    """One denoising step of diffusers' UNet, with or without its own IP-Adapter processors."""

    def __init__(self, unet: Any, weights: AdapterWeights | None) -> None:
        """Take over `unet`.

        Args:
            unet: an unchanged `UNet2DConditionModel`.
            weights: adapter to install; `None`: the base model alone.
        """
        self._unet = unet
        self._projection: ImageProjection | None = None
        if weights is not None:
            self._install(weights)

    def _install(self, weights: AdapterWeights) -> None:
        proj = weights.projection["proj.weight"]
        width = weights.projection["norm.weight"].shape[0]
        self._projection = ImageProjection(
            image_embed_dim=proj.shape[1], cross_attention_dim=width, num_image_text_embeds=weights.tokens
        )
        renamed = {name.replace("proj.", "image_embeds."): value for name, value in weights.projection.items()}
        self._projection.load_state_dict(renamed)
        self._projection.requires_grad_(False)
        for index, attention in enumerate(cross_attentions(self._unet).values()):
            key, value = weights.keys_values[2 * index : 2 * index + 2]
            processor = IPAdapterAttnProcessor2_0(
                hidden_size=key.shape[0], cross_attention_dim=width, num_tokens=(weights.tokens,), scale=1.0
            )
            processor.load_state_dict({"to_k_ip.0.weight": key, "to_v_ip.0.weight": value})
            processor.requires_grad_(False)
            attention.set_processor(processor)

    def __call__(self, inputs: Mapping[str, Array], scale: float) -> Array:
        """Predicted noise, float32.

        Args:
            inputs: `sample`, `timestep`, `encoder_hidden_states` and `image_embeds` (not read by the base model alone).
            scale: `ip_adapter_scale`.
        """
        sample, timestep, text, image_embeds = (
            torch.from_numpy(inputs[name].astype(np.float32))
            for name in ("sample", "timestep", "encoder_hidden_states", "image_embeds")
        )
        condition: Any = text
        if self._projection is not None:
            tokens = self._projection(image_embeds)[:, None]  # (batch, images, tokens, width)
            condition = (text, [tokens])
            for attention in cross_attentions(self._unet).values():
                attention.processor.scale = [scale]
        with torch.no_grad():
            noise_pred: Array = self._unet(sample, timestep, condition, return_dict=False)[0].numpy()
        return noise_pred
