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
from ipa.engines.spec import SD15, SDXL, ComponentSpec, Dimensions, control_residuals, controlnet_spec
from ipa.export.attention import attend
from ipa.export.family import TITLES, family_of_config
from ipa.export.named_files import named
from ipa.export.onnx_export import EXAMPLE_SIZES, Graph
from ipa.export.pipeline import BasePipeline
from ipa.export.precision import to_half
from ipa.export.source import Source, reading

# Options that add inputs which the graph does not have.
_UNSUPPORTED = ("class_embed_type", "encoder_hid_dim_type")
_OWNERS = {SD15: f"{TITLES[SD15]} or 2.x", SDXL: TITLES[SDXL]}  # of ControlNets that take what the family does
_ADDED_SIZES: Mapping[str, Mapping[str, str]] = {
    SD15: {},
    SDXL: {
        "numbers beside the timestep": "projection_class_embeddings_input_dim",
        "numbers made of a size": "addition_time_embed_dim",
    },
}
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
    spec: ComponentSpec  # of its graph, sizes and dtype open
    downscale: int  # pixels per latent
    is_global: bool  # see `ipa.engines.manifest.ControlNetRecord`

    @classmethod
    def read(cls, given: ControlNetSource, base: BasePipeline) -> ControlNet:
        """Read the configuration and check it against a base model.

        Raises:
            IpaError: it is none, or is for another model; the message names both sides.
        """
        source = Source.parse(given.location, f"ControlNet '{given.name}':")
        config = source.json("config.json")
        if config is None or config.get("_class_name") != ControlNetModel.__name__:
            found = "has no config.json" if config is None else f"is a {config.get('_class_name')}"
            raise IpaError(f"{source} {found}; --controlnet takes a {ControlNetModel.__name__} in diffusers format")
        used = ["addition_embed_type"] if config.get("addition_embed_type") not in (None, "text_time") else []
        used += [option for option in _UNSUPPORTED if config.get(option)]
        if used:
            raise IpaError(
                f"ControlNet {source} uses {used[0]} ({config[used[0]]}), which this base model does not have; "
                "use one made for this base model"
            )
        unet_config = base.unet_config
        widths = config.get("cross_attention_dim", 1280), unet_config.get("cross_attention_dim", 1280)
        if (family := family_of_config(config)) != base.family:
            raise IpaError(
                f"ControlNet {source} is for {_OWNERS[family]} (text of width {widths[0]}), this base model is "
                f"{TITLES[base.family]} ({widths[1]}); use a ControlNet made for this base model"
            )
        channels, downscale = base.vae_config.get("latent_channels", 4), base.vae_record.downscale
        shrinks = len(config.get("conditioning_embedding_out_channels") or _EMBEDDING_CHANNELS) - 1
        sides: tuple[tuple[str, object, object], ...] = (
            ("text of width", *widths),
            *((what, config.get(option), unet_config.get(option)) for what, option in _ADDED_SIZES[family].items()),
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
        residuals = control_residuals(_channels(unet_config), _layers(unet_config))
        spec = controlnet_spec(residuals, family, _has_attention(config))
        return cls(given.name, source, spec, downscale, is_global)

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
        spec = self.spec.resolved(dimensions.sizes(), dtype)
        module = ControlNetResiduals(self.load(), spec)
        sizes = {side: EXAMPLE_SIZES[f"latent_{side}"] * self.downscale for side in ("height", "width")}
        return Graph(f"controlnet/{self.name}", to_half(module) if dtype == "float16" else module, spec, sizes)


class ControlNetResiduals(nn.Module):
    """The ControlNet as it is exported: every residual at the size of the feature map that it is added to."""

    def __init__(self, model: Any, spec: ComponentSpec) -> None:
        """Take over `model`: its attention processors are replaced, its global pooling is done here."""
        super().__init__()
        self._is_global = bool(model.config.global_pool_conditions)
        self._inputs = [tensor.name for tensor in spec.inputs]
        model.register_to_config(global_pool_conditions=False)  # it would leave maps of one position
        for module in model.modules():
            if isinstance(module, Attention):
                module.set_processor(TextAttention())
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """`down_block_res_0`, ..., `mid_block_res`; see `ipa.engines.spec.controlnet_spec` for inputs and shapes."""
        given = dict(zip(self._inputs, inputs, strict=True))
        # In float32 until the embedding of all of them, as the sinusoids are.
        added = {name: given[name].float() for name in ("text_embeds", "time_ids") if name in given}
        down, mid = self.model(
            given["sample"],
            given["timestep"],
            given.get("encoder_hidden_states"),
            given["controlnet_cond"],
            added_cond_kwargs=added,
            return_dict=False,
        )
        residuals = (*down, mid)
        if self._is_global:  # the mean in float32: half has no room for the sum of a whole map
            residuals = tuple(
                one.float().mean(dim=(2, 3), keepdim=True).to(one.dtype).expand_as(one) for one in residuals
            )
        return residuals


class TextAttention:
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


def read_controlnets(given: Sequence[ControlNetSource], base: BasePipeline) -> list[ControlNet]:
    """All of them, see `ControlNet.read`.

    Raises:
        IpaError: also where two have the same name.
    """
    if len({source.name for source in given}) < len(given):
        raise IpaError("two ControlNets have the same name; name them with --controlnet NAME=DIR_OR_ID")
    controlnets = []
    for source in given:
        with reading(f"{source.location}/config.json"):
            controlnets.append(ControlNet.read(source, base))
    return controlnets


def _has_attention(config: Mapping[str, Any]) -> bool:
    """Whether a ControlNet looks at the text; where its configuration says nothing of a block, it is diffusers' own."""
    blocks = (config.get("mid_block_type") or "CrossAttn", *(config.get("down_block_types") or ["CrossAttn"]))
    return any("CrossAttn" in block for block in blocks)


def _channels(config: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(config.get("block_out_channels", (320, 640, 1280, 1280)))


def _layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    layers = config.get("layers_per_block", 2)
    return (layers,) * len(_channels(config)) if isinstance(layers, int) else tuple(layers)


def _text(side: object) -> str:
    return "/".join(map(str, side)) if isinstance(side, tuple) else str(side)
