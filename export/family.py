"""Which family of base models a pipeline is of, and what that family has or has not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ipa.engines.errors import IpaError
from ipa.engines.spec import SD15, SDXL

_KINDS = ("Pipeline", "Img2ImgPipeline", "InpaintPipeline")
_CLASSES = {SD15: "StableDiffusion", SDXL: "StableDiffusionXL"}
TITLES = {SD15: "Stable Diffusion 1.x", SDXL: "Stable Diffusion XL"}
_UNET = "UNet2DConditionModel"
# UNet options that add inputs which the graph does not have.
_UNSUPPORTED = ("class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
_TIME_IDS = 6  # original size, crop, target size; a refiner has two sizes, crop and aesthetic score: 5


def family_of(base: str, index: Mapping[str, Any]) -> str:
    """The family of a pipeline.

    Args:
        base: for messages.
        index: its `model_index.json`.
    Raises:
        IpaError: one that is not supported.
    """
    name = index.get("_class_name")
    for family, prefix in _CLASSES.items():
        if name in [f"{prefix}{kind}" for kind in _KINDS]:
            if family == SDXL and (index.get("requires_aesthetics_score") or not _has(index, "text_encoder")):
                raise _refiner(base)
            return family
    raise IpaError(
        f"{base} is a {name}, which is not supported yet; expected a pipeline of {' or '.join(TITLES.values())} "
        f"({' or '.join(f'{prefix}{_KINDS[0]}' for prefix in _CLASSES.values())})"
    )


def family_of_config(config: Mapping[str, Any]) -> str:
    """The family of a UNet or a ControlNet, by what it takes beside the text: sizes and pooled text are SDXL's."""
    return SDXL if config.get("addition_embed_type") == "text_time" else SD15


def check_unet(
    source: object, family: str, unet_config: Mapping[str, Any], text_width: int, text_embed_width: int
) -> None:
    """Refuse a UNet that takes something else than its family does.

    Args:
        source: of the pipeline, for messages.
        text_width: of the text encoders together.
        text_embed_width: of SDXL's pooled text.
    Raises:
        IpaError: names it.
    """
    if (name := unet_config.get("_class_name", _UNET)) != _UNET:
        raise IpaError(f"{source}: the unet is a {name}, which is not supported; expected a {_UNET}")
    used = [option for option in _UNSUPPORTED if unet_config.get(option)]
    kind = unet_config.get("addition_embed_type")
    if kind is not None and (family, kind) != (SDXL, "text_time"):
        used.append("addition_embed_type")
    if used:
        raise IpaError(f"{source}: the unet uses {used[0]}, which is not supported yet")
    width = unet_config.get("cross_attention_dim")
    if width != text_width:
        raise IpaError(f"{source}: the unet wants text of width {width}, the text encoder gives {text_width}")
    if family != SDXL:
        return
    taken, each = (
        int(unet_config.get(name) or 0) for name in ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
    )
    given = text_embed_width + _TIME_IDS * each
    if kind == "text_time" and taken == given - each:
        raise _refiner(source)
    if kind != "text_time" or taken != given:
        raise IpaError(
            f"{source}: the unet takes {taken} numbers beside the timestep (projection_class_embeddings_input_dim), "
            f"expected {given} of Stable Diffusion XL: {text_embed_width} of the pooled text and {each} for each of "
            f"{_TIME_IDS} sizes"
        )


def _has(index: Mapping[str, Any], part: str) -> bool:
    """Whether a pipeline has a part: `["transformers", "CLIPTextModel"]`, or `[null, null]` where it has not."""
    entry = index.get(part)
    return bool(entry) and entry != [None, None]


def _refiner(base: object) -> IpaError:
    return IpaError(
        f"{base} is a refiner of Stable Diffusion XL (one text encoder, 5 time ids), which is not supported; "
        "--base takes the base model, which image prompts are for"
    )
