"""Taking keys and values of cross-attention out of the UNet.

They depend on the text and on the reference image, never on the timestep or the latents. So the UNet that is
exported receives them packed (`ipa.engines.kv_layout.KVLayout`), and its own `to_k`/`to_v` become the `text_kv` graph.
Source: arXiv:2308.06721, formula (5), for the sum of the two attentions before `to_out`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ipa.engines.errors import IpaError
from ipa.engines.kv_layout import KVLayer, KVLayout
from ipa.engines.spec import ONE_SLOT, ImageSlots, TensorSpec, added_conditions
from ipa.export.attention import attend
from ipa.export.family import family_of_config

KeysValues = tuple[Tensor, ...]  # K_0, V_0, K_1, V_1, ... each (batch, tokens, width)


class Conditions(NamedTuple):
    """What cross-attention layers get in place of `encoder_hidden_states`.

    Attributes:
        text: of the text.
        images: of the image prompt in each slot.
        masks: by level (batch, slots, positions); none without masks.
    """

    text: KeysValues
    images: tuple[KeysValues, ...]
    masks: Mapping[int, Tensor]


def cross_attentions(unet: UNet2DConditionModel) -> dict[str, Attention]:
    """Cross-attention layers by module path, in the order of an adapter file's keys.

    Module registration order: down blocks, up blocks, mid block last.
    """
    parts = ("down_blocks.", "up_blocks.", "mid_block.")
    return {
        name: module
        for name, module in unet.named_modules()
        if name.startswith(parts) and name.endswith(".attn2") and isinstance(module, Attention)
    }


def kv_layout(unet: UNet2DConditionModel) -> KVLayout:
    """Which layer lies where in the packed keys and values."""
    layers = cross_attentions(unet)
    return KVLayout(tuple(KVLayer(name, attention.inner_kv_dim) for name, attention in layers.items()))


def config_kv_layout(unet_config: Mapping[str, Any]) -> KVLayout:
    """The layout of a UNet that is not loaded."""
    with torch.device("meta"):
        return kv_layout(UNet2DConditionModel.from_config(dict(unet_config)))


def split_kv(packed: Tensor, layout: KVLayout) -> KeysValues:
    """Keys and values of all layers; one `Split` in the graph.

    Args:
        packed: (batch, tokens, kv).
    """
    widths = [width for width in layout.widths for _ in ("key", "value")]
    return torch.split(packed, widths, dim=-1)


def packed_linear(weights: Sequence[Tensor]) -> nn.Linear:
    """One bias-free projection that makes the keys and values of all layers at once.

    Args:
        weights: K_0, V_0, K_1, V_1, ... each (width, features).
    """
    packed = torch.cat([weight.detach() for weight in weights])
    linear = nn.Linear(packed.shape[1], packed.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(packed, requires_grad=False)
    return linear


def text_kv_linear(unet: UNet2DConditionModel) -> nn.Linear:
    """The UNet's own `to_k`/`to_v` of every cross-attention layer, packed."""
    weights: list[Tensor] = []
    for name, attention in cross_attentions(unet).items():
        for linear in (attention.to_k, attention.to_v):
            if linear.bias is not None:
                raise IpaError(f"unet: {name} has biases on its keys or values, which no Stable Diffusion model has")
            weights.append(linear.weight)
    return packed_linear(weights)


class HoistedAttention:
    """Attention processor of the exported UNet, for self- and cross-attention layers.

    A self-attention layer projects its own keys and values. A cross-attention layer gets them ready-made.
    """

    def __init__(self, index: int | None, level: int = 0) -> None:
        """Make a processor for cross-attention layer `index` of the layout, on `level`; `None`: self-attention."""
        self._index, self._level = index, level

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Conditions | None = None,
        attention_mask: None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend; (batch, positions, channels) in and out."""
        query = attn.to_q(hidden_states)
        if self._index is None or encoder_hidden_states is None:
            result = attend(attn, query, attn.to_k(hidden_states), attn.to_v(hidden_states))
        else:
            conditions, key, value = encoder_hidden_states, 2 * self._index, 2 * self._index + 1
            mask = conditions.masks.get(self._level)
            result = attend(attn, query, conditions.text[key], conditions.text[value])
            for slot, image in enumerate(conditions.images):
                shown = attend(attn, query, image[key], image[value])
                result = result + (shown if mask is None else shown * mask[:, slot, :, None])
        return cast(Tensor, attn.to_out[1](attn.to_out[0](result)))


class HoistedUNet(nn.Module):
    """The UNet as it is exported: latents and packed keys and values in, predicted noise out."""

    def __init__(
        self, unet: UNet2DConditionModel, slots: ImageSlots = ONE_SLOT, residuals: tuple[TensorSpec, ...] = ()
    ) -> None:
        """Take over `unet`: its attention processors are replaced and its cross-attention `to_k`/`to_v` dropped.

        Call `text_kv_linear` first.

        Args:
            slots: its room for image prompts.
            residuals: what it takes of ControlNets; none: it has no inputs for them.
        """
        super().__init__()
        self.layout, self.slots, self.residuals = kv_layout(unet), slots, residuals
        self.added = tuple(tensor.name for tensor in added_conditions(family_of_config(unet.config)))
        levels = self.layout.levels
        self.mask_levels = sorted(set(levels)) if slots.has_masks else []
        for module in unet.modules():
            if isinstance(module, Attention):
                module.set_processor(HoistedAttention(None))
        for index, attention in enumerate(cross_attentions(unet).values()):
            attention.set_processor(HoistedAttention(index, levels[index]))
            attention.to_k = attention.to_v = None
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, text_kv: Tensor, *others: Tensor) -> Tensor:
        """Predict the noise; see `ipa.engines.spec.unet_spec` for shapes.

        Args:
            others: `text_embeds` and `time_ids` of SDXL; `image_kv` of each slot, the masks of each level, then the
                residuals of ControlNets.
        """
        images = others[len(self.added) :]
        first_residual = self.slots.count + len(self.mask_levels)
        masks, residuals = images[self.slots.count : first_residual], images[first_residual:]
        # In float32 until the embedding of all of them, as the sinusoids are.
        added = {name: tensor.float() for name, tensor in zip(self.added, others, strict=False)}
        conditions = Conditions(
            split_kv(text_kv, self.layout),
            tuple(split_kv(image_kv, self.layout) for image_kv in images[: self.slots.count]),
            dict(zip(self.mask_levels, masks, strict=True)),
        )
        controlled: dict[str, Any] = {}
        if residuals:
            controlled["down_block_additional_residuals"] = residuals[:-1]
            controlled["mid_block_additional_residual"] = residuals[-1]
        output = self.unet(sample, timestep, conditions, added_cond_kwargs=added, return_dict=False, **controlled)
        return cast(Tensor, output[0])
