"""From an image embedding to image tokens."""

from __future__ import annotations

from torch import Tensor, nn


class ImageProjModel(nn.Module):
    """The base-kind projection: one linear layer, cut into tokens, each normalised.

    The parameter names (``proj``, ``norm``) are those of the adapter file.

    Args:
        image_embed_dim: width of the image encoder's ``image_embeds``.
        cross_attention_dim: width of the UNet's text states, which the tokens stand beside.
        num_tokens: image tokens per image.
    Source: arXiv:2308.06721, section 3.2.1.
    """

    def __init__(self, image_embed_dim: int, cross_attention_dim: int, num_tokens: int = 4) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.proj = nn.Linear(image_embed_dim, num_tokens * cross_attention_dim)
        self.norm = nn.LayerNorm(cross_attention_dim)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """Image tokens (batch, num_tokens, cross_attention_dim) of embeddings (batch, image_embed_dim)."""
        tokens = self.proj(image_embeds).unflatten(-1, (self.num_tokens, -1))
        return self.norm(tokens)  # type: ignore[no-any-return]
