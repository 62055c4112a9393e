"""Decoupled cross-attention: text attention plus scaled image attention, put into a UNet and taken out again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipa.trainer.errors import TrainError

BLOCKS_IN_FILE_ORDER = ("down_blocks", "up_blocks", "mid_block")


class IPAttnProcessor(nn.Module):
    """Attention processor of one cross-attention layer with image keys and values.

    ``Attention(Q, K, V) + scale * Attention(Q, K_ip, V_ip)``, both before the layer's output projection.
    The image tokens come in as ``cross_attention_kwargs={"ip_hidden_states": tokens}``.

    Args:
        attention: the diffusers ``Attention`` layer; the image weights start as copies of its ``to_k`` and ``to_v``.
    Source: arXiv:2308.06721, formula (5).
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        hidden_size, cross_attention_dim = attention.to_k.weight.shape
        self.scale = 1.0
        self.to_k_ip = nn.Linear(cross_attention_dim, hidden_size, bias=False)
        self.to_v_ip = nn.Linear(cross_attention_dim, hidden_size, bias=False)
        with torch.no_grad():
            self.to_k_ip.weight.copy_(attention.to_k.weight)
            self.to_v_ip.weight.copy_(attention.to_v.weight)

    # diffusers reads the names of this method's parameters, so `forward` (behind `*args`) would not do.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *,
        ip_hidden_states: Tensor,
    ) -> Tensor:
        """Attend to text and image.

        Args:
            attn: the layer this processor sits in.
            hidden_states: (batch, height * width, hidden_size).
            encoder_hidden_states: text states (batch, 77, cross_attention_dim).
            attention_mask: additive text mask, as diffusers prepares it; the image part is never masked.
            temb: unused by attention; part of diffusers' interface.
            ip_hidden_states: image tokens (batch, num_tokens, cross_attention_dim).
        """
        query = _split_heads(attn.to_q(hidden_states), attn.heads)
        key = _split_heads(attn.to_k(encoder_hidden_states), attn.heads)
        value = _split_heads(attn.to_v(encoder_hidden_states), attn.heads)
        if attention_mask is not None:
            batch, text_length = encoder_hidden_states.shape[:2]
            attention_mask = attn.prepare_attention_mask(attention_mask, text_length, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=attn.scale)

        image_key = _split_heads(self.to_k_ip(ip_hidden_states), attn.heads)
        image_value = _split_heads(self.to_v_ip(ip_hidden_states), attn.heads)
        attended = attended + self.scale * F.scaled_dot_product_attention(
            query, image_key, image_value, scale=attn.scale
        )
        merged = attended.transpose(1, 2).flatten(2)
        projection, dropout = attn.to_out
        return dropout(projection(merged))  # type: ignore[no-any-return]


def cross_attention_layers(unet: Any) -> list[tuple[str, Any]]:
    """Names and layers of a UNet's cross-attention, in the order of the adapter file.

    That order is down blocks, up blocks, mid block last: diffusers' registration order, not the order of use.
    Only these blocks are searched, because a loaded image projection may hold attention layers of its own.

    Raises:
        TrainError: the UNet has no cross-attention, or a kind that the adapter's formula does not cover.
    """
    layers = []
    for block in BLOCKS_IN_FILE_ORDER:
        module = getattr(unet, block, None)
        if module is None:
            continue
        for name, layer in module.named_modules():
            if name.split(".")[-1] == "attn2":
                layers.append((f"{block}.{name}", layer))
    if not layers:
        raise TrainError("the base model's UNet has no cross-attention layers (attn2), so it cannot take an adapter")
    for name, layer in layers:
        _check_plain(name, layer)
    return layers


def inject(unet: Any) -> tuple[nn.ModuleList, dict[str, Any]]:
    """Give every cross-attention layer an image branch.

    Returns:
        The processors in file order, and the originals by layer name, for ``eject``.
    """
    processors, originals = nn.ModuleList(), {}
    for name, layer in cross_attention_layers(unet):
        originals[name] = layer.processor
        processor = IPAttnProcessor(layer)
        processors.append(processor)
        layer.set_processor(processor)
    return processors, originals


def eject(unet: Any, originals: dict[str, Any]) -> None:
    """Take the image branches out again; the UNet is exactly what it was."""
    for name, processor in originals.items():
        unet.get_submodule(name).set_processor(processor)


def _split_heads(states: Tensor, heads: int) -> Tensor:
    """(batch, tokens, hidden_size) to (batch, heads, tokens, hidden_size / heads)."""
    batch, tokens, _ = states.shape
    return states.view(batch, tokens, heads, -1).transpose(1, 2)


def _check_plain(name: str, layer: Any) -> None:
    """Refuse attention that has more steps than the plain kind of Stable Diffusion."""
    extras = ("group_norm", "spatial_norm", "norm_cross", "norm_q", "norm_k")
    found = [extra for extra in extras if getattr(layer, extra, None) is not None]
    if found or layer.residual_connection or layer.rescale_output_factor != 1:
        detail = ", ".join(found) or "a residual connection or output rescaling"
        raise TrainError(f"unet: attention layer {name} has {detail}; adapters are trained on plain cross-attention")
