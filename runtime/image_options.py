"""The image options of `ipa-run`: `[NAME=]VALUE`, where NAME is one of the adapters that the command names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ipa.engines.errors import RequestError
from ipa.runtime.block_scales import parse_scale
from ipa.runtime.options import flag, named, number
from ipa.runtime.prompt_fields import PromptFields

OPTIONS = (
    "image",
    "adapter",
    "ip_adapter_scale",
    "ip_adapter_mask",
    "ip_adapter_start",
    "ip_adapter_end",
    "image_embeds",
)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")  # without a dot: no file
# By option, the field of `ImagePrompt`; and how its text is read.
_SEVERAL = {"image": "images", "ip_adapter_mask": "masks"}
_SINGLE: Mapping[str, tuple[str, Callable[[str, str], Any]]] = {
    "ip_adapter_scale": ("scale", lambda option, text: parse_scale(text)),
    "ip_adapter_start": ("start", number),
    "ip_adapter_end": ("end", number),
    "image_embeds": ("embeds", lambda option, text: text),
}


def image_options(options: Mapping[str, Sequence[str]]) -> list[PromptFields]:
    """The image prompts that the image options name, one for each adapter, with what was given for it alone.

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
    for option in _SINGLE:
        for name, values in given[option].items():
            if len(values) > 1:
                raise RequestError(f"{flag(option)} is given {len(values)} times for {named('adapter', name)}")
    if not names and not any(given.values()):
        return []
    adapters_named: list[str | None] = [*names] or [None]
    return [_prompt(name, given) for name in adapters_named]


def _prompt(adapter: str | None, given: Mapping[str, Mapping[str | None, list[str]]]) -> PromptFields:
    prompt: dict[str, Any] = {} if adapter is None else {"adapter": adapter}
    for option, name in _SEVERAL.items():
        if adapter in given[option]:
            prompt[name] = tuple(given[option][adapter])
    for option, (name, read) in _SINGLE.items():
        if adapter in given[option]:
            prompt[name] = read(option, given[option][adapter][0])
    return prompt


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
                f"{flag(option)} {value}: which adapter is it for? Write {flag(option)} NAME={value}, "
                f"with NAME one of {', '.join(names)}"
            )
        elif separator and _NAME.fullmatch(name) and not os.path.exists(value):  # noqa: PTH110  Path's raises on long names
            raise RequestError(
                f"{flag(option)} {value}: no adapter '{name}' is named; add --adapter {name}, or leave '{name}=' out"
            )
        else:
            found.setdefault(names[0] if names else None, []).append(value)
    return found
