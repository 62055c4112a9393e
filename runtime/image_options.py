"""The image options of `ipa-run`: `[NAME=]VALUE`, where NAME is one of the adapters that the command names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ipa.engines.errors import RequestError
from ipa.runtime.block_scales import parse_scale
from ipa.runtime.image_prompt import ImagePrompt

OPTIONS = (
    "image",
    "adapter",
    "ip_adapter_scale",
    "ip_adapter_mask",
    "ip_adapter_start",
    "ip_adapter_end",
    "image_embeds",
)


def image_fields(options: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Fields of `Request` for the image options.

    One image and at most one adapter and scale become the simple fields, which `--from` can override one by one;
    anything else becomes `image_prompts`.

    Args:
        options: the values given for each of `OPTIONS`.
    Raises:
        RequestError: a value does not fit, or it is not clear which adapter it is for.
    """
    adapters = [_split_adapter(text) for text in options["adapter"]]
    names = [name for name, _ in adapters]
    if len(set(names)) < len(names):
        raise RequestError("--adapter names the same adapter twice; give it several --image instead")
    given = {option: _by_adapter(option, options[option], names) for option in OPTIONS if option != "adapter"}
    for adapter, scale in adapters:
        if scale is not None:
            given["ip_adapter_scale"].setdefault(adapter, []).append(scale)
    if not any(given.values()) and len(names) <= 1:
        return {"adapter": names[0]} if names else {}
    for option in ("ip_adapter_scale", "ip_adapter_start", "ip_adapter_end", "image_embeds"):
        for name, values in given[option].items():
            if len(values) > 1:
                raise RequestError(f"{_flag(option)} is given {len(values)} times for {_named(name)}")
    wanted: list[str | None] = [*names] or [None]
    is_simple = len(wanted) == 1 and not any(given[option] for option in OPTIONS[3:])
    images = {name: given["image"].get(name, []) for name in wanted}
    if is_simple and len(images[wanted[0]]) <= 1:
        return _simple_fields(wanted[0], given)
    return {"image_prompts": tuple(_prompt(name, given) for name in wanted)}


def _simple_fields(name: str | None, given: Mapping[str, Mapping[str | None, list[str]]]) -> dict[str, Any]:
    fields: dict[str, Any] = {} if name is None else {"adapter": name}
    if given["image"]:
        fields["image"] = given["image"][name][0]
    if given["ip_adapter_scale"]:
        fields["ip_adapter_scale"] = parse_scale(given["ip_adapter_scale"][name][0])
    return fields


def _prompt(name: str | None, given: Mapping[str, Mapping[str | None, list[str]]]) -> ImagePrompt:
    limits = {
        which: _number(f"ip_adapter_{which}", given[f"ip_adapter_{which}"][name][0])
        for which in ("start", "end")
        if name in given[f"ip_adapter_{which}"]
    }
    scale, embeds = given["ip_adapter_scale"].get(name), given["image_embeds"].get(name)
    return ImagePrompt(
        images=tuple(given["image"].get(name, ())),
        adapter=name,
        scale=None if scale is None else parse_scale(scale[0]),
        masks=tuple(given["ip_adapter_mask"].get(name, ())),
        start=limits.get("start", 0.0),
        end=limits.get("end", 1.0),
        embeds=None if embeds is None else embeds[0],
    )


def _split_adapter(text: str) -> tuple[str, str | None]:
    """`NAME` or `NAME=SCALE`."""
    name, separator, scale = text.partition("=")
    return name, scale if separator else None


def _by_adapter(option: str, values: Sequence[str], names: Sequence[str]) -> dict[str | None, list[str]]:
    """The values of an option by adapter. Without a known name in front, a value is for the only adapter."""
    found: dict[str | None, list[str]] = {}
    for value in values:
        name, separator, rest = value.partition("=")
        if separator and name in names:
            found.setdefault(name, []).append(rest)
        elif len(names) > 1:
            raise RequestError(
                f"{_flag(option)} {value}: which adapter is it for? Write {_flag(option)} NAME={value}, "
                f"with NAME one of {', '.join(names)}"
            )
        else:
            found.setdefault(names[0] if names else None, []).append(value)
    return found


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def _named(name: str | None) -> str:
    return "the adapter" if name is None else f"adapter '{name}'"


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise RequestError(f"{_flag(option)} is {text!r}, expected a number from 0 to 1") from error
