"""`NAME=FILE` and `FILE=VALUE`, as options say them. What exists under the whole text is meant as it stands."""

from __future__ import annotations

import re
from pathlib import Path

from ipa.engines.errors import IpaError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


def named(text: str, own: str, what: str) -> tuple[str, str]:
    """Name and place of `[NAME=]PLACE`.

    Args:
        own: the place's own name, for a text without one; characters that no name has become hyphens.
        what: is named, for the message.
    Raises:
        IpaError: the name has other characters than letters, digits, `_` and `-`.
    """
    name, separator, place = text.partition("=")
    if not separator or "/" in name or Path(text).exists():
        name, place = re.sub(r"[^A-Za-z0-9_-]+", "-", own).strip("-"), text
    if not _NAME.fullmatch(name):
        raise IpaError(f"{what} name {name!r} may hold only letters, digits, '_' and '-'; use NAME={place}")
    return name, place


def valued(text: str, is_last: bool) -> tuple[Path, str | None]:
    """File and value of `FILE[=VALUE]`; `None` without a value.

    Args:
        is_last: whether the last `=` counts, not the first.
    """
    file, separator, value = text.rpartition("=") if is_last else text.partition("=")
    if not separator or Path(text).exists():
        return Path(text), None
    return Path(file), value
