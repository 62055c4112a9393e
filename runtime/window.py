"""The share of the denoising steps in which an image prompt or a ControlNet counts."""

from __future__ import annotations

from ipa.engines.errors import RequestError


def check_window(what: str, whose: str, start: object, end: object) -> None:
    """Refuse what is no share of the steps.

    Args:
        what, whose: around `start` and `end` in the message.
    Raises:
        RequestError: a number is not from 0 to 1, or the start is not before the end.
    """
    for name, value in (("start", start), ("end", end)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise RequestError(f"{what}{name}{whose} is {value!r}, expected a number from 0 to 1")
    assert isinstance(start, int | float) and isinstance(end, int | float)
    if start >= end:
        raise RequestError(f"{what}start{whose} is {start}, expected less than the end, {end}")


def is_in_window(index: int, count: int, start: float, end: float) -> bool:
    """Whether step `index` of `count` lies in it as a whole.

    Source: diffusers 0.42.1, pipeline_controlnet.py, `controlnet_keep`.
    """
    return index / count >= start and (index + 1) / count <= end
