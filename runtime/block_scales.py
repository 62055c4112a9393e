"""`ip_adapter_scale` by block: how much each cross-attention layer takes from an image prompt.

A scale is a number, the name of a preset, or a mapping as diffusers' `set_ip_adapter_scale` takes it:

    {"down": {"block_2": [0.0, 1.0]}, "mid": 0.5, "up": {"block_0": [0.0, 1.0, 0.0]}}

What it does not name gets 0. A list has one number for each attention of the block.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from ipa.engines.errors import RequestError
from ipa.engines.kv_layout import KVLayout
from ipa.runtime.numbers import NUMBER_TEXT, is_number

Scale: TypeAlias = float | str | Mapping[str, Any]

_STYLE = {"up": {"block_0": [0.0, 1.0, 0.0]}}
_LAYOUT = {"down": {"block_2": [0.0, 1.0]}}
# Blocks of Stable Diffusion XL. Source: InstantStyle, arXiv:2404.02733, section 3.2.
PRESETS: Mapping[str, Mapping[str, Any]] = {"style": _STYLE, "layout": _LAYOUT, "style+layout": _STYLE | _LAYOUT}
PRESET_FAMILY = "sdxl"


def parse_scale(text: str) -> Scale:
    """A number, a preset's name or a JSON object, from a command line.

    Raises:
        RequestError: none of them.
    """
    if text in PRESETS:
        return text
    try:
        scale: Any = json.loads(text) if text.lstrip().startswith("{") else float(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"--ip-adapter-scale {text!r} is neither a number nor one of {', '.join(PRESETS)} nor JSON such as "
            '\'{"up": {"block_2": 1}}\''
        ) from error
    check_scale(scale)
    return scale  # type: ignore[no-any-return]


def check_scale(scale: object) -> None:
    """Refuse what is a scale for no model.

    Raises:
        RequestError: names it.
    """
    if isinstance(scale, str) and scale not in PRESETS:
        raise RequestError(f"ip_adapter_scale {scale!r} is no preset; expected one of {', '.join(PRESETS)}")
    if isinstance(scale, Mapping):
        for part in scale:
            if part not in ("down", "mid", "up"):
                raise RequestError(f"ip_adapter_scale names {part!r}; a UNet has 'down', 'mid' and 'up'")
    elif not isinstance(scale, str) and not is_number(scale):
        raise RequestError(f"ip_adapter_scale is {scale!r}, expected {NUMBER_TEXT}, a preset or a scale by block")


def layer_scales(scale: Scale, layout: KVLayout, family: str) -> list[float]:
    """The scale of each cross-attention layer.

    Args:
        scale: see the module.
        layout: the UNet's layers.
        family: of the bundle; presets belong to one.
    Raises:
        RequestError: the UNet has no such block, or another number of attentions in it.
    """
    if isinstance(scale, str):
        if family != PRESET_FAMILY:
            raise RequestError(
                f"ip_adapter_scale '{scale}' names blocks of Stable Diffusion XL, this bundle is of the family "
                f"'{family}'; give a number, or its blocks: {_blocks_text(layout)}"
            )
        scale = PRESETS[scale]
    if not isinstance(scale, Mapping):
        return [float(scale)] * len(layout.layers)
    scales = _attention_scales(scale, layout)
    return [scales.get(_attention(layer.name), 0.0) for layer in layout.layers]


_Attention = tuple[str, str, int]  # "down", "block_2", 1


def _attention(name: str) -> _Attention:
    """Where a layer lies: `up_blocks.1.attentions.2...` is ("up", "block_1", 2); the middle has one."""
    part, index, *rest = name.split(".")
    if part == "mid_block":
        return "mid", "", int(rest[0])
    return part.removesuffix("_blocks"), f"block_{index}", int(rest[1])


def _attention_scales(scale: Mapping[str, Any], layout: KVLayout) -> dict[_Attention, float]:
    counts: dict[tuple[str, str], int] = {}
    for part, block, index in (_attention(layer.name) for layer in layout.layers):
        counts[part, block] = max(counts.get((part, block), 0), index + 1)
    scales: dict[_Attention, float] = {}
    for part, value in scale.items():
        blocks = {block for known, block in counts if known == part}
        by_block = value if isinstance(value, Mapping) and part != "mid" else dict.fromkeys(blocks, value)
        for block, numbers in by_block.items():
            if block not in blocks:
                raise RequestError(
                    f"ip_adapter_scale names {part}.{block}, this UNet has attention in {_blocks_text(layout)}"
                )
            spread = _spread(numbers, counts[part, block], f"{part}.{block}".rstrip("."))
            scales |= {(part, block, index): number for index, number in enumerate(spread)}
    return scales


def _spread(value: object, count: int, where: str) -> list[float]:
    """One number for each of `count` attentions."""
    numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if len(numbers) == 1:
        numbers *= count
    if len(numbers) != count or not all(map(is_number, numbers)):
        raise RequestError(f"ip_adapter_scale of {where} is {value!r}, expected {NUMBER_TEXT}, or a list of {count}")
    return [float(number) for number in numbers]  # type: ignore[arg-type]


def _blocks_text(layout: KVLayout) -> str:
    """`down.block_0, down.block_1, mid, up.block_1`, in the order of a picture's way through the UNet."""
    names = {f"{part}.{block}".rstrip(".") for part, block, _ in (_attention(layer.name) for layer in layout.layers)}
    return ", ".join(sorted(names))
