"""The PyTorch side of validation: base model, adapter and ControlNet as diffusers computes them.

Nothing of it is the exporter's, but for what is changed in the base model before: its UNet comes with LoRAs added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import Tensor, nn

from ipa.engines.engine import Array
from ipa.engines.spec import SDXL, ComponentSpec, added_conditions, axis_size
from ipa.export.adapters import AdapterWeights
from ipa.export.hoist import cross_attentions
from ipa.export.oracle_projections import diffusers_projection


class DiffusersControlNet(nn.Module):
    """The ControlNet as diffusers computes it, with residuals that have no place spread over the map."""

    def __init__(self, model: Any, spec: ComponentSpec) -> None:
        """Take over an unchanged `ControlNetModel`; `spec` as the bundle has it."""
        super().__init__()
        self.model, self._residuals = model, spec.outputs
        self.inputs = [tensor.name for tensor in spec.inputs]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The residuals, that of the middle last, of what `inputs` names."""
        given = dict(zip(self.inputs, inputs, strict=True))
        sample, timestep, picture = (given.pop(name) for name in ("sample", "timestep", "controlnet_cond"))
        text = given.pop("encoder_hidden_states", None)
        down, mid = self.model(sample, timestep, text, picture, added_cond_kwargs=given, return_dict=False)
        sizes = {"batch": sample.shape[0], "latent_height": sample.shape[2], "latent_width": sample.shape[3]}
        shapes = ([axis_size(axis, sizes) for axis in tensor.axes] for tensor in self._residuals)
        return tuple(residual.expand(shape) for residual, shape in zip((*down, mid), shapes, strict=True))


Control = tuple[DiffusersControlNet, float]


class DiffusersStep:
    """One denoising step of diffusers' UNet, with or without its own IP-Adapter processors."""

    def __init__(self, unet: Any, weights: AdapterWeights | None) -> None:
        """Take over `unet`.

        Args:
            unet: an unchanged `UNet2DConditionModel`.
            weights: adapter to install; `None`: the base model alone.
        """
        self._unet = unet
        self._projection: Any = None
        self._feature = ""
        if weights is not None:
            self._install(weights)

    def _install(self, weights: AdapterWeights) -> None:
        self._feature, self._projection = weights.feature, diffusers_projection(weights)
        self._projection.requires_grad_(False)
        for index, attention in enumerate(cross_attentions(self._unet).values()):
            key, value = weights.keys_values[2 * index : 2 * index + 2]
            processor = IPAdapterAttnProcessor2_0(
                hidden_size=key.shape[0], cross_attention_dim=key.shape[1], num_tokens=(weights.tokens,), scale=1.0
            )
            processor.load_state_dict({"to_k_ip.0.weight": key, "to_v_ip.0.weight": value})
            processor.requires_grad_(False)
            attention.set_processor(processor)

    def __call__(self, inputs: Mapping[str, Array], scale: float, control: Control | None = None) -> Array:
        """Predicted noise, float32.

        Args:
            inputs: `sample`, `timestep`, `encoder_hidden_states` and the image feature that the adapter reads; for
                Stable Diffusion XL `text_embeds` and `time_ids`, for a ControlNet `controlnet_cond`, too.
            scale: `ip_adapter_scale`.
            control: a ControlNet and its `controlnet_conditioning_scale`.
        """
        sample, timestep, text = (
            torch.from_numpy(inputs[name].astype(np.float32))
            for name in ("sample", "timestep", "encoder_hidden_states")
        )
        added = {
            tensor.name: torch.from_numpy(inputs[tensor.name].astype(np.float32))
            for tensor in added_conditions(SDXL)
            if tensor.name in inputs
        }
        condition: Any = text
        if self._projection is not None:
            tokens = self._projection(torch.from_numpy(inputs[self._feature].astype(np.float32)))
            condition = (text, [tokens[:, None]])  # (batch, images, tokens, width)
            for attention in cross_attentions(self._unet).values():
                attention.processor.scale = [scale]
        with torch.no_grad():
            controlled: dict[str, Any] = {}
            if control is not None:
                controlnet, weight = control
                picture = torch.from_numpy(inputs["controlnet_cond"].astype(np.float32))
                latents = sample[:, : controlnet.model.config.in_channels]  # an inpainting model takes more
                given = {"sample": latents, "timestep": timestep, "encoder_hidden_states": text, **added}
                given["controlnet_cond"] = picture
                residuals = controlnet(*(given[name] for name in controlnet.inputs))
                *down, mid = (weight * residual for residual in residuals)
                controlled = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            output = self._unet(sample, timestep, condition, added_cond_kwargs=added, return_dict=False, **controlled)
        noise_pred: Array = output[0].numpy()
        return noise_pred
