"""The trainable whole: a frozen UNet with an adapter in it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ipa.trainer.attention import eject, inject
from ipa.trainer.projection import ImageProjModel
from ipa.trainer.weights import StateDict, load_adapter_state_dict, named_weights


class AdapterModel(nn.Module):
    """A UNet with image prompts.

    Args:
        unet: ``UNet2DConditionModel``; frozen by the caller, and changed in place until ``eject``.
        image_embed_dim: width of the image encoder's embedding.
        num_tokens: image tokens per image.
    """

    def __init__(self, unet: Any, image_embed_dim: int, num_tokens: int) -> None:
        super().__init__()
        self.unet = unet
        self.image_proj = ImageProjModel(image_embed_dim, unet.config.cross_attention_dim, num_tokens)
        # The processors are modules inside the UNet too; parameters are shared, not copied.
        self.processors, self._originals = inject(unet)

    def forward(
        self, noisy_latents: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, image_embeds: Tensor
    ) -> Tensor:
        """The UNet's prediction, of the shape of ``noisy_latents`` (batch, 4, h, w).

        Args:
            noisy_latents: scaled latents with noise.
            timesteps: (batch,) training timesteps.
            encoder_hidden_states: text states (batch, 77, cross_attention_dim).
            image_embeds: (batch, image_embed_dim); zeros stand for "no image".
        """
        prediction = self.unet(
            noisy_latents,
            timesteps,
            encoder_hidden_states=encoder_hidden_states,
            cross_attention_kwargs={"ip_hidden_states": self.image_proj(image_embeds)},
        )
        return prediction.sample  # type: ignore[no-any-return]

    def adapter_parameters(self) -> list[nn.Parameter]:
        """What is trained, always in the same order: the projection, then the layers in file order."""
        return [*self.image_proj.parameters(), *self.processors.parameters()]

    def named_weights(self) -> StateDict:
        """The adapter's weights under their file names; the very tensors, not copies."""
        return named_weights(self.image_proj, self.processors)

    def load_adapter_state_dict(self, state: StateDict, source: str) -> None:
        """Take over weights; ``source`` is named in the error when they do not fit."""
        load_adapter_state_dict(state, self.image_proj, self.processors, source)

    def eject(self) -> None:
        """Give the UNet back exactly as it came."""
        eject(self.unet, self._originals)
