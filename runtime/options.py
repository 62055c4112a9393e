"""What the options of `ipa-run` for image prompts and ControlNets share."""

from __future__ import annotations

from ipa.engines.errors import RequestError


def flag(option: str) -> str:
    """`ip_adapter_end` as people type it: `--ip-adapter-end`."""
    return "--" + option.replace("_", "-")


def number(option: str, text: str) -> float:
    """The number that an option was given.

    Raises:
        RequestError: it is none.
    """
    try:
        return float(text)
    except ValueError as error:
        raise RequestError(f"{flag(option)} is {text!r}, expected a number") from error


def named(what: str, name: str | None) -> str:
    """`adapter 'style'`, or `the adapter` where it has no name."""
    return f"the {what}" if name is None else f"{what} '{name}'"
