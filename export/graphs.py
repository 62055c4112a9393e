"""Each component of the bundle as a PyTorch module whose `forward` takes and gives the tensors of the spec table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

from ipa.engines.spec import SD15, SDXL, Dimensions, ImageSlots, TensorSpec, family_specs, unet_spec
from ipa.export.attention import SpatialAttention
from ipa.export.hoist import HoistedUNet, text_kv_linear
from ipa.export.onnx_export import Graph
from ipa.export.pipeline import BasePipeline
from ipa.export.precision import to_half


class TextEncoder(nn.Module):
    """CLIP's last hidden state after the final layer norm, as SD1.5 uses it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """`encoder_hidden_states`."""
        return cast(Tensor, self.model(input_ids).last_hidden_state)


class PenultimateTextEncoder(nn.Module):
    """CLIP's state before its last layer, without the final norm, as SDXL uses its first text encoder."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """`encoder_hidden_states`."""
        return cast(Tensor, self.model(input_ids, output_hidden_states=True).hidden_states[-2])


class PooledTextEncoder(nn.Module):
    """The same, and the last state of the end token, normed and projected, as SDXL uses its second.

    diffusers' `clip_skip` counts on from the state before the last layer; the pooled text has all layers.
    """

    def __init__(self, model: nn.Module, clip_skip: int = 0) -> None:
        super().__init__()
        self.model, self.clip_skip = model, clip_skip

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`encoder_hidden_states`, `text_embeds`."""
        output = self.model(input_ids, output_hidden_states=True)
        return output.hidden_states[-(self.clip_skip + 2)], output.text_embeds


class ImageEncoder(nn.Module):
    """CLIP's projected embedding, and the penultimate layer that plus adapters read."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """`image_embeds`, `hidden_states`."""
        output = self.model(pixel_values, output_hidden_states=True)
        return output.image_embeds, output.hidden_states[-2]


class VaeDecoder(nn.Module):
    """Latents, already divided by the scaling factor, to an image in [-1, 1]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        """`image`."""
        hidden_states = latents if self.post_quant_conv is None else self.post_quant_conv(latents)
        return cast(Tensor, self.decoder(hidden_states))


class VaeEncoder(nn.Module):
    """An image in [-1, 1] to mean and logarithm of the variance of its latents, before the scaling factor."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """`latent_mean`, `latent_logvar`, the latter clamped to [-30, 20] as diffusers does."""
        moments = self.encoder(image)
        mean, logvar = (moments if self.quant_conv is None else self.quant_conv(moments)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)


def component_modules(
    base: BasePipeline, slots: ImageSlots, residuals: tuple[TensorSpec, ...] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """Modules of all components in FP32, one part loaded at a time.

    Use each before asking for the next: `unet` takes over the model that `text_kv` was read from.

    Args:
        slots: the UNet's room for image prompts.
        residuals: what the UNet takes of ControlNets.
    """
    if base.family == SDXL:
        yield "text_encoder", PenultimateTextEncoder(_plain_attention(base.load_text_encoder()))
        yield "text_encoder_2", PooledTextEncoder(_plain_attention(base.load_text_encoder_2()), base.clip_skip)
    else:
        yield "text_encoder", TextEncoder(_plain_attention(base.load_text_encoder()))
    unet = base.load_unet()
    yield "text_kv", text_kv_linear(unet)
    yield "unet", HoistedUNet(unet, slots, residuals)
    del unet
    yield "image_encoder", ImageEncoder(_plain_attention(base.load_image_encoder()))
    vae = base.load_vae()
    vae.set_attn_processor(SpatialAttention())
    yield "vae_decoder", VaeDecoder(vae)
    yield "vae_encoder", VaeEncoder(vae)


def _plain_attention(model: Any) -> Any:
    """Attention as MatMul, Softmax, MatMul: traced through PyTorch's fused function, FP16 models turn to float32."""
    model.set_attn_implementation("eager")
    return model


def typed_graph(name: str, module: nn.Module, dimensions: Dimensions, dtype: str, family: str = SD15) -> Graph:
    """A component ready for export.

    Args:
        dtype: `float32` or `float16`; the latter converts `module` in place.
        family: of the base model.
    """
    if isinstance(module, HoistedUNet):
        generic = unet_spec(module.slots, module.layout.levels, module.residuals, family)
    else:
        generic = family_specs(family)[name]
    spec = generic.resolved(dimensions.sizes(), dtype)
    return Graph(name, to_half(module) if dtype == "float16" else module, spec)
