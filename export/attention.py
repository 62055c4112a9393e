"""Attention of the traced models: one node of `ipa.export.attention_function` for each layer."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ipa.export.attention_function import DOMAIN, OPERATOR


def attend(attn: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T * scale) value by head; scores in float32 where the model asks for it.

    Args:
        attn: the layer, for its number of heads and its scale.
        query: (batch, positions, channels).
        key, value: (batch, tokens, channels).
    Returns:
        (batch, positions, channels), in the query's dtype.
    """
    dtype = query.dtype
    if attn.upcast_attention:
        query, key, value = query.float(), key.float(), value.float()
    return multi_head_attention(query, key, value, attn.heads, attn.scale).to(dtype)


def multi_head_attention(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float) -> Tensor:
    """softmax(query key^T * scale) value by head, as one node of the graph.

    Args:
        query: (batch, positions, channels).
        key, value: (batch, tokens, channels).
    Returns:
        (batch, positions, channels).
    """
    # torch.autograd.Function.apply is not typed.
    result = _MultiHeadAttention.apply(query, key, value, heads, scale)  # type: ignore[no-untyped-call]
    return cast(Tensor, result)


class SpatialAttention:
    """Attention processor for the positions of a feature map, as a VAE has it: one norm, one residual."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend; (batch, channels, height, width) in and out."""
        positions = hidden_states.flatten(2)
        if attn.group_norm is not None:
            positions = attn.group_norm(positions)
        positions = positions.transpose(1, 2)
        result = attend(attn, attn.to_q(positions), attn.to_k(positions), attn.to_v(positions))
        result = attn.to_out[1](attn.to_out[0](result)).transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            result = result + hidden_states
        return cast(Tensor, result / attn.rescale_output_factor)


class _MultiHeadAttention(torch.autograd.Function):
    """What `multi_head_attention` computes, in eager mode and as a node."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float) -> Tensor:
        query, key, value = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key, value))
        return scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2)

    @staticmethod
    def symbolic(g: Any, query: Any, key: Any, value: Any, heads: int, scale: float) -> Any:
        node = g.op(f"{DOMAIN}::{OPERATOR}", query, key, value, num_heads_i=heads, scale_f=scale)
        node.setType(query.type())
        return node
