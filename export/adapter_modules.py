"""The networks of IP-Adapters: from an image feature to image tokens, and on to keys and values of every layer.

Parameters have the names of the published files, so a file's tensors load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ipa.export.attention import multi_head_attention
from ipa.export.hoist import packed_linear

HEAD_WIDTH = 64  # of every published resampler; files do not hold it


class Projection(nn.Module):
    """An image feature to image tokens of the text's width."""

    tokens: int  # per image
    feature_width: int  # of what it reads

    def __init__(self, feature_width: int, tokens: int) -> None:
        super().__init__()
        self.feature_width, self.tokens = feature_width, tokens


class LinearProjection(Projection):
    """Kind base: every token is a linear map of the image's embedding. Source: arXiv:2308.06721, section 3.2.1."""

    def __init__(self, feature_width: int, tokens: int, width: int) -> None:
        super().__init__(feature_width, tokens)
        self.width = width
        self.proj = nn.Linear(feature_width, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """(batch, feature_width) to (batch, tokens, width)."""
        tokens: Tensor = self.norm(self.proj(image_embeds).reshape(-1, self.tokens, self.width))
        return tokens


class PositionProjection(Projection):
    """Kind full-face: one token for every position of the image encoder, by the same two layers."""

    def __init__(self, feature_width: int, tokens: int, width: int) -> None:
        super().__init__(feature_width, tokens)
        self.proj = nn.Sequential(
            nn.Linear(feature_width, feature_width), nn.GELU(), nn.Linear(feature_width, width), nn.LayerNorm(width)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch, tokens, feature_width) to (batch, tokens, width)."""
        tokens: Tensor = self.proj(hidden_states)
        return tokens


class Resampler(Projection):
    """Kind plus: learned queries read all positions of the image encoder, layer by layer.

    Source: the Perceiver Resampler of arXiv:2204.14198, section 3.1.1 and figure 5, with a feed-forward that has no
    biases and projections on both ends.
    """

    def __init__(
        self,
        feature_width: int,
        tokens: int,
        width: int,
        latent_width: int,
        attention_width: int,
        feed_forward_width: int,
        depth: int,
    ) -> None:
        """Make one without weights.

        Args:
            feature_width: of the image encoder's hidden states.
            tokens: learned queries.
            width: of the text.
            latent_width: of the queries between the projections.
            attention_width: of all heads together, a multiple of `HEAD_WIDTH`.
            feed_forward_width: inside the feed-forward, usually 4 * `latent_width`.
            depth: layers.
        """
        super().__init__(feature_width, tokens)
        self.latents = nn.Parameter(torch.empty(1, tokens, latent_width))
        self.proj_in = nn.Linear(feature_width, latent_width)
        self.proj_out = nn.Linear(latent_width, width)
        self.norm_out = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [LatentAttention(latent_width, attention_width), _feed_forward(latent_width, feed_forward_width)]
            )
            for _ in range(depth)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch, positions, feature_width) to (batch, tokens, width)."""
        features: Tensor = self.proj_in(hidden_states)
        latents = self.latents.expand(hidden_states.shape[0], -1, -1)  # a shape is traced, `len` is not
        for layer in self.layers:
            attention, feed_forward = layer.children()
            latents = latents + attention(features, latents)
            latents = latents + feed_forward(latents)
        tokens: Tensor = self.norm_out(self.proj_out(latents))
        return tokens


class LatentAttention(nn.Module):
    """The queries attend to the features and to themselves, in one softmax."""

    def __init__(self, width: int, attention_width: int) -> None:
        super().__init__()
        self.heads = attention_width // HEAD_WIDTH
        self.norm1 = nn.LayerNorm(width)  # of the features
        self.norm2 = nn.LayerNorm(width)  # of the queries
        self.to_q = nn.Linear(width, attention_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * attention_width, bias=False)
        self.to_out = nn.Linear(attention_width, width, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """(batch, positions, width) and (batch, tokens, width) to (batch, tokens, width)."""
        latents = self.norm2(latents)
        key, value = self.to_kv(torch.cat([self.norm1(features), latents], dim=1)).chunk(2, dim=-1)
        result: Tensor = self.to_out(multi_head_attention(self.to_q(latents), key, value, self.heads, HEAD_WIDTH**-0.5))
        return result


class Adapter(nn.Module):
    """A projection and the packed `to_k_ip`/`to_v_ip` of all layers. Source: arXiv:2308.06721, formula (5)."""

    def __init__(self, projection: Projection, keys_values: Sequence[Tensor]) -> None:
        """Make the graph of one adapter.

        Args:
            projection: with its weights.
            keys_values: K_0, V_0, K_1, V_1, ... each (width, text_width).
        """
        super().__init__()
        self.projection = projection
        self.kv = packed_linear(keys_values)
        self.requires_grad_(False)

    def forward(self, feature: Tensor) -> Tensor:
        """`image_kv`, unscaled."""
        image_kv: Tensor = self.kv(self.projection(feature))
        return image_kv


def _feed_forward(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, inner, bias=False), nn.GELU(), nn.Linear(inner, width, bias=False)
    )
