"""The ControlNet options of `ipa-run`: `[NAME=]VALUE`, where NAME is one of the bundle's ControlNets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ipa.engines.errors import RequestError
from ipa.runtime.control_image import ControlImage
from ipa.runtime.options import flag, named, number

CONTROL_OPTIONS = ("control_image", "controlnet_scale", "control_start", "control_end")
_NUMBERS = {"controlnet_scale": "scale", "control_start": "start", "control_end": "end"}
_NAMED = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_-]*)=(.*)", re.DOTALL)


def control_fields(options: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Fields of `Request` for the ControlNet options.

    Args:
        options: the values given for each of `CONTROL_OPTIONS`.
    Raises:
        RequestError: a value does not fit, or it is not clear which ControlNet it is for.
    """
    images: dict[str | None, str] = {}
    for text in options["control_image"]:
        name, file = _split(text)
        if name in images:
            raise RequestError(f"--control-image is given twice for {named('ControlNet', name)}; name each: NAME=FILE")
        images[name] = file
    if None in images and len(images) > 1:
        raise RequestError(f"--control-image {images[None]}: which ControlNet is it for? Write NAME={images[None]}")
    numbers: dict[str | None, dict[str, float]] = {name: {} for name in images}
    for option, key in _NUMBERS.items():
        for text in options[option]:
            name, value = _owner(option, text, images)
            if key in numbers[name]:
                raise RequestError(f"{flag(option)} is given twice for {named('ControlNet', name)}")
            numbers[name][key] = number(option, value)
    controls = tuple(ControlImage(file, name, **numbers[name]) for name, file in images.items())
    return {"controls": controls} if controls else {}


def _owner(option: str, text: str, images: Mapping[str | None, str]) -> tuple[str | None, str]:
    """Whose control image a value is for. Without a name it is for the only one."""
    name, value = _split(text)
    if not images:
        raise RequestError(f"{flag(option)} {text} is for a control image: add --control-image [NAME=]FILE")
    if name in images:
        return name, value
    known = ", ".join(str(image) for image in images if image) or "none by name"
    if name is not None:
        raise RequestError(f"{flag(option)} {text}: there is no control image for '{name}' (there is: {known})")
    if len(images) > 1:
        raise RequestError(
            f"{flag(option)} {text}: which ControlNet is it for? Write {flag(option)} NAME={text}, with one of {known}"
        )
    return next(iter(images)), value


def _split(text: str) -> tuple[str | None, str]:
    """`[NAME=]VALUE`."""
    found = _NAMED.fullmatch(text)
    return (found[1], found[2]) if found else (None, text)
