"""The contract between export, engines and runtime: which component has which tensors.

Export writes graphs to this table, the runtime reads tensors by it, tests check both against it.
An axis is an `int` (fixed), a free name (`batch`, `tokens`, ...: any size, equal wherever the name
appears in one call) or a name that `Dimensions` turns into an `int` for a given base model.
Names are diffusers' names. The negative half of a guidance batch comes first, always.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from ipa.engines.errors import BundleError

Axis = int | str
MAX_SLOTS = 8
FLOAT = "float"  # stands for the dtype a component was exported in

SD15, SDXL = "sd15", "sdxl"  # families: Stable Diffusion 1.x, Stable Diffusion XL
COMPONENTS = ("text_encoder", "text_kv", "image_encoder", "unet", "vae_decoder", "vae_encoder")


@dataclass(frozen=True)
class TensorSpec:
    """Name, axes and dtype of one input or output."""

    name: str
    axes: tuple[Axis, ...]
    dtype: str = FLOAT

    def resolved(self, sizes: Mapping[str, int], dtype: str) -> TensorSpec:
        """This spec with every axis in `sizes` fixed and `FLOAT` replaced by `dtype`."""
        axes = tuple(sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in self.axes)
        return replace(self, axes=axes, dtype=dtype if self.dtype == FLOAT else self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype}({', '.join(map(str, self.axes))})"


@dataclass(frozen=True)
class ComponentSpec:
    """Inputs and outputs of one component, in the order of its graph."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def resolved(self, sizes: Mapping[str, int], dtype: str) -> ComponentSpec:
        """Both sides with known axes fixed and the dtype filled in."""
        return ComponentSpec(
            inputs=tuple(tensor.resolved(sizes, dtype) for tensor in self.inputs),
            outputs=tuple(tensor.resolved(sizes, dtype) for tensor in self.outputs),
        )


@dataclass(frozen=True)
class Dimensions:
    """The sizes that a base model and its encoders fix; every field is an axis name of the spec table."""

    text_tokens: int  # 77
    text_width: int  # 768 in SD1.5; 2048 in SDXL, where two encoders' states lie side by side
    kv: int  # 2 * sum of the cross-attention widths: 24960 in SD1.5
    image_size: int  # pixels, 224 for ViT-H/14
    image_embed_width: int  # 1024 for ViT-H/14
    image_patches: int  # patches + CLS: 257 for ViT-H/14
    image_hidden_width: int  # 1280 for ViT-H/14
    latent_channels: int  # 4
    unet_in_channels: int  # 4; 9 in inpainting models
    text_width_1: int = 0  # of SDXL's first text encoder: 768
    text_width_2: int = 0  # of its second: 1280
    text_embed_width: int = 0  # of the second's pooled and projected output: 1280

    def sizes(self) -> dict[str, int]:
        """Axis name to size."""
        return asdict(self)


def _latents(name: str, channels: str = "latent_channels") -> TensorSpec:
    return TensorSpec(name, ("batch", channels, "latent_height", "latent_width"))


_ENCODER_HIDDEN_STATES = TensorSpec("encoder_hidden_states", ("batch", "text_tokens", "text_width"))
_TEXT_KV = TensorSpec("text_kv", ("batch", "text_tokens", "kv"))
_IMAGE_KV = TensorSpec("image_kv", ("batch", "tokens", "kv"))
_IMAGE_MASK = "image_mask_"
_DOWN_RESIDUAL, _MID_RESIDUAL = "down_block_res_", "mid_block_res"
_IMAGE = TensorSpec("image", ("batch", 3, "height", "width"))
_CONTROLNET_COND = replace(_IMAGE, name="controlnet_cond")
_IMAGE_EMBEDS = TensorSpec("image_embeds", ("batch", "image_embed_width"))
_HIDDEN_STATES = TensorSpec("hidden_states", ("batch", "image_patches", "image_hidden_width"))
# float32 in every precision: float16 has no room for exact sums of sinusoid arguments near 999.
_TIMESTEP = TensorSpec("timestep", (), "float32")
_INPUT_IDS = TensorSpec("input_ids", ("batch", "text_tokens"), "int64")
_TEXT_EMBEDS = TensorSpec("text_embeds", ("batch", "text_embed_width"))
# Original height and width, top and left of the crop, target height and width; sinusoids are made of them, too.
_TIME_IDS = TensorSpec("time_ids", ("batch", 6), "float32")

SPECS: Mapping[str, ComponentSpec] = {
    "text_encoder": ComponentSpec((_INPUT_IDS,), (_ENCODER_HIDDEN_STATES,)),
    "text_kv": ComponentSpec((_ENCODER_HIDDEN_STATES,), (_TEXT_KV,)),
    "image_encoder": ComponentSpec(
        (TensorSpec("pixel_values", ("batch", 3, "image_size", "image_size")),), (_IMAGE_EMBEDS, _HIDDEN_STATES)
    ),
    "unet": ComponentSpec(
        (_latents("sample", "unet_in_channels"), _TIMESTEP, _TEXT_KV, _IMAGE_KV), (_latents("noise_pred"),)
    ),
    "vae_decoder": ComponentSpec((_latents("latents"),), (_IMAGE,)),
    "vae_encoder": ComponentSpec((_IMAGE,), (_latents("latent_mean"), _latents("latent_logvar"))),
}

# Stable Diffusion XL: both encoders give the states before their last layer, which go to `text_kv` side by side.
_SDXL_SPECS: Mapping[str, ComponentSpec] = {
    "text_encoder": ComponentSpec(
        (_INPUT_IDS,), (replace(_ENCODER_HIDDEN_STATES, axes=("batch", "text_tokens", "text_width_1")),)
    ),
    "text_encoder_2": ComponentSpec(
        (_INPUT_IDS,),
        (replace(_ENCODER_HIDDEN_STATES, axes=("batch", "text_tokens", "text_width_2")), _TEXT_EMBEDS),
    ),
    "text_kv": SPECS["text_kv"],
    "image_encoder": SPECS["image_encoder"],
    "unet": ComponentSpec(
        (*SPECS["unet"].inputs[:3], _TEXT_EMBEDS, _TIME_IDS, *SPECS["unet"].inputs[3:]), SPECS["unet"].outputs
    ),
    "vae_decoder": SPECS["vae_decoder"],
    "vae_encoder": SPECS["vae_encoder"],
}
_FAMILIES = {SD15: SPECS, SDXL: _SDXL_SPECS}


def family_specs(family: str) -> Mapping[str, ComponentSpec]:
    """The components of a family of base models, in order.

    Raises:
        BundleError: only a later version knows the family.
    """
    if family not in _FAMILIES:
        raise BundleError(
            f"the bundle is of the family '{family}', this ipa-runtime knows {', '.join(_FAMILIES)}; "
            "upgrade with `pip install -U ipa-runtime`"
        )
    return _FAMILIES[family]


def added_conditions(family: str) -> tuple[TensorSpec, ...]:
    """What UNet and ControlNets of a family take beside latents, timestep and text, image prompts aside."""
    return family_specs(family)["unet"].inputs[3:-1]


@dataclass(frozen=True)
class ImageSlots:
    """A UNet's room for image prompts. Each slot is an attention of its own; those of all slots are added up.

    One adapter's images share a slot, where their tokens lie side by side; adapters, and images with masks, take one
    slot each.

    Attributes:
        count: how many slots.
        has_masks: whether a slot's attention is weighed by a mask over the picture.
    """

    count: int = 1
    has_masks: bool = False

    @classmethod
    def of(cls, unet: ComponentSpec) -> ImageSlots:
        """The slots of an exported UNet."""
        names = [tensor.name for tensor in unet.inputs]
        has_masks = any(name.startswith(_IMAGE_MASK) for name in names)
        return cls(sum(name.startswith(_IMAGE_KV.name) for name in names), has_masks)

    @property
    def image_kv(self) -> tuple[str, ...]:
        """The input of each slot: `image_kv`, `image_kv_1`, ..."""
        return tuple(f"{_IMAGE_KV.name}_{slot}" if slot else _IMAGE_KV.name for slot in range(self.count))


ONE_SLOT = ImageSlots()


def image_mask(level: int) -> str:
    """The input that holds every slot's mask for the layers of one resolution."""
    return f"{_IMAGE_MASK}{level}"


def positions(level: int, latent_height: int, latent_width: int) -> int:
    """How many positions the layers of a level attend from."""
    return level_size(latent_height, level) * level_size(latent_width, level)


def level_size(latents: int, level: int) -> int:
    """How many positions a side of the latents has at a level: each one halves it and rounds up."""
    return -(-latents // (1 << level))


def axis_size(axis: Axis, sizes: Mapping[str, int]) -> int:
    """The size of an axis.

    Args:
        sizes: of free axes. Where it does not name them, a slot's tokens are those of the first, and a mask's
            positions and the sizes of a level follow from the latents.
    """
    if isinstance(axis, int) or axis in sizes:
        return axis if isinstance(axis, int) else sizes[axis]
    kind, _, number = axis.rpartition("_")
    if kind == "positions":
        return positions(int(number), sizes["latent_height"], sizes["latent_width"])
    if kind in ("latent_height", "latent_width"):
        return level_size(sizes[kind], int(number))
    return sizes[kind if kind == "tokens" else axis]


def unet_spec(
    slots: ImageSlots, levels: Iterable[int] = (), residuals: Iterable[TensorSpec] = (), family: str = SD15
) -> ComponentSpec:
    """The UNet's spec.

    Args:
        slots: its room for image prompts.
        levels: resolutions that have cross-attention, as `KVLayout.levels` gives them; masks come for each.
        residuals: what it takes of ControlNets, see `control_residuals`.
        family: of the base model.
    """
    sample, timestep, text_kv, *_ = SPECS["unet"].inputs
    image_kv = (
        replace(_IMAGE_KV, name=name, axes=("batch", f"tokens_{slot}" if slot else "tokens", "kv"))
        for slot, name in enumerate(slots.image_kv)
    )
    masks = (
        TensorSpec(image_mask(level), ("batch", slots.count, f"positions_{level}"))
        for level in (sorted(set(levels)) if slots.has_masks else ())
    )
    inputs = (sample, timestep, text_kv, *added_conditions(family), *image_kv, *masks, *residuals)
    return ComponentSpec(inputs, SPECS["unet"].outputs)


def control_residuals(channels: Sequence[int], layers: Sequence[int]) -> tuple[TensorSpec, ...]:
    """What a ControlNet adds to the skip connections of a UNet and to its middle: the last one.

    Args:
        channels, layers: of each block on the way down: `block_out_channels` and `layers_per_block`.
    """
    shapes = [(channels[0], 0)]  # of `conv_in`
    for level, (width, count) in enumerate(zip(channels, layers, strict=True)):
        shapes += [(width, level)] * count
        shapes += [(width, level + 1)] if level + 1 < len(channels) else []
    names = (*(f"{_DOWN_RESIDUAL}{index}" for index in range(len(shapes))), _MID_RESIDUAL)
    shapes.append((channels[-1], len(channels) - 1))
    return tuple(
        TensorSpec(name, ("batch", width, *_level_axes(level)))
        for name, (width, level) in zip(names, shapes, strict=True)
    )


def residuals_of(unet: ComponentSpec) -> tuple[TensorSpec, ...]:
    """The inputs of an exported UNet that ControlNets fill; none where it was exported without."""
    return tuple(tensor for tensor in unet.inputs if tensor.name.startswith((_DOWN_RESIDUAL, _MID_RESIDUAL)))


def controlnet_spec(residuals: Iterable[TensorSpec], family: str = SD15, has_attention: bool = True) -> ComponentSpec:
    """The spec of a ControlNet's graph: unscaled residuals from latents, text and a control image of 0 to 1.

    Args:
        residuals: see `control_residuals`.
        family: of the base model.
        has_attention: whether it looks at the text; some small ones do not.
    """
    text = (_ENCODER_HIDDEN_STATES,) if has_attention else ()
    inputs = (_latents("sample"), _TIMESTEP, *text, *added_conditions(family), _CONTROLNET_COND)
    return ComponentSpec(inputs, tuple(residuals))


def _level_axes(level: int) -> tuple[Axis, Axis]:
    """Height and width of a level's feature maps."""
    return ("latent_height", "latent_width") if level == 0 else (f"latent_height_{level}", f"latent_width_{level}")


# One adapter graph per image feature: `image_embeds` for base adapters, `hidden_states` for plus and full-face.
ADAPTER_FEATURES: Mapping[str, TensorSpec] = {"image_embeds": _IMAGE_EMBEDS, "hidden_states": _HIDDEN_STATES}


def adapter_spec(feature: str) -> ComponentSpec:
    """The spec of an adapter's graph: one image feature in, unscaled keys and values out."""
    return ComponentSpec((ADAPTER_FEATURES[feature],), (_IMAGE_KV,))
