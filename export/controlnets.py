"""ControlNets: whether one fits a base model, and the graph made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from diffusers import ControlNetModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ipa.engines.errors import IpaError
from ipa.engines.spec import Dimensions, TensorSpec, control_residuals, controlnet_spec
from ipa.export.attention import attend
from ipa.export.named_files import named
from ipa.export.onnx_export import EXAMPLE_SIZES, Graph
from ipa.export.precision import to_half
from ipa.export.source import Source

# Options that add inputs which the graph does not have.
_UNSUPPORTED = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type")
_EMBEDDING_CHANNELS = (16, 32, 96, 256)  # of the control image, where the configuration names none
_IMAGE_CHANNELS = 3


@dataclass(frozen=True)
class ControlNetSource:
    """A folder or Hub id and the name that the bundle will know the ControlNet by."""

    name: str
    location: str

    @classmethod
    def parse(cls, text: str) -> ControlNetSource:
        """`[NAME=]DIR_OR_ID`; without a name the last part of the place is the name.

        Raises:
            IpaError: the name has other characters than letters, digits, `_` and `-`.
        """
        return cls(*named(text, text.rstrip("/").rpartition("/")[2], "ControlNet"))


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet that fits a base model; its weights are read when asked for."""

    name: str
    source: Source
    residuals: tuple[TensorSpec, ...]
    downscale: int  # pixels per latent
    is_global: bool  # see `ipa.engines.manifest.ControlNetRecord`

    @classmethod
    def read(cls, given: ControlNetSource, unet_config: Mapping[str, Any], channels: int, downscale: int) -> ControlNet:
        """Read the configuration and check it against a base model.

        Args:
            unet_config: of the base model's UNet.
            channels: of its latents.
            downscale: pixels per latent.
        Raises:
            IpaError: it is none, or is for another model; the message names both sides.
        """
        source = Source.parse(given.location, f"ControlNet '{given.name}':")
        config = source.json("config.json")
        if config is None or config.get("_class_name") != ControlNetModel.__name__:
            found = "has no config.json" if config is None else f"is a {config.get('_class_name')}"
            raise IpaError(f"{source} {found}; --controlnet takes a {ControlNetModel.__name__} in diffusers format")
        used = [option for option in _UNSUPPORTED if config.get(option)]
        if used:
            raise IpaError(
                f"ControlNet {source} uses {used[0]} ({config[used[0]]}), which this base model does not have; "
                "use one made for this base model"
            )
        shrinks = len(config.get("conditioning_embedding_out_channels") or _EMBEDDING_CHANNELS) - 1
        sides: tuple[tuple[str, object, object], ...] = (
            ("text of width", config.get("cross_attention_dim", 1280), unet_config.get("cross_attention_dim", 1280)),
            ("latents of channels", config.get("in_channels", channels), channels),
            ("blocks of channels", _channels(config), _channels(unet_config)),
            ("blocks of layers", _layers(config), _layers(unet_config)),
            ("control images of channels", config.get("conditioning_channels", _IMAGE_CHANNELS), _IMAGE_CHANNELS),
            ("pixels per latent", 2**shrinks, downscale),
        )
        for what, its, expected in sides:
            if its != expected:
                raise IpaError(
                    f"ControlNet {source} is for {what} {_text(its)}, this base model has {_text(expected)}; "
                    "use a ControlNet made for this base model"
                )
        is_global = bool(config.get("global_pool_conditions", False))
        return cls(given.name, source, unet_residuals(unet_config), downscale, is_global)

    @property
    def origin(self) -> str:
        """Where it is from, as a bundle records it: no path of this machine."""
        place = Path(self.source.location)
        return place.resolve().name if place.is_dir() else str(self.source)

    def load(self) -> Any:
        """The `ControlNetModel`."""
        return self.source.load(ControlNetModel.from_pretrained, "").eval().requires_grad_(False)

    def graph(self, dimensions: Dimensions, dtype: str) -> Graph:
        """Ready for export."""
        spec, module = (
            controlnet_spec(self.residuals).resolved(dimensions.sizes(), dtype),
            ControlNetResiduals(self.load()),
        )
        sizes = {side: EXAMPLE_SIZES[f"latent_{side}"] * self.downscale for side in ("height", "width")}
        return Graph(f"controlnet/{self.name}", to_half(module) if dtype == "float16" else module, spec, sizes)


class ControlNetResiduals(nn.Module):
    """The ControlNet as it is exported: every residual at the size of the feature map that it is added to."""

    def __init__(self, model: Any) -> None:
        """Take over `model`: its attention processors are replaced, its global pooling is done here."""
        super().__init__()
        self._is_global = bool(model.config.global_pool_conditions)
        model.register_to_config(global_pool_conditions=False)  # it would leave maps of one position
        for module in model.modules():
            if isinstance(module, Attention):
                module.set_processor(_TextAttention())
        self.model = model

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, controlnet_cond: Tensor
    ) -> tuple[Tensor, ...]:
        """`down_block_res_0`, ..., `mid_block_res`; see `ipa.engines.spec.control_residuals` for shapes."""
        down, mid = self.model(sample, timestep, encoder_hidden_states, controlnet_cond, return_dict=False)
        residuals = (*down, mid)
        if self._is_global:  # the mean in float32: half has no room for the sum of a whole map
            residuals = tuple(
                one.float().mean(dim=(2, 3), keepdim=True).to(one.dtype).expand_as(one) for one in residuals
            )
        return residuals


class _TextAttention:
    """Attention processor: self-attention, or attention to the text alone."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend; (batch, positions, channels) in and out."""
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        result = attend(attn, attn.to_q(hidden_states), attn.to_k(states), attn.to_v(states))
        return cast(Tensor, attn.to_out[1](attn.to_out[0](result)))


def unet_residuals(unet_config: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """What a UNet takes of ControlNets."""
    return control_residuals(_channels(unet_config), _layers(unet_config))


def read_controlnets(
    given: Sequence[ControlNetSource], unet_config: Mapping[str, Any], channels: int, downscale: int
) -> list[ControlNet]:
    """All of them, see `ControlNet.read`.

    Raises:
        IpaError: also where two have the same name.
    """
    if len({source.name for source in given}) < len(given):
        raise IpaError("two ControlNets have the same name; name them with --controlnet NAME=DIR_OR_ID")
    return [ControlNet.read(source, unet_config, channels, downscale) for source in given]


def _channels(config: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(config.get("block_out_channels", (320, 640, 1280, 1280)))


def _layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    layers = config.get("layers_per_block", 2)
    return (layers,) * len(_channels(config)) if isinstance(layers, int) else tuple(layers)


def _text(side: object) -> str:
    return "/".join(map(str, side)) if isinstance(side, tuple) else str(side)
