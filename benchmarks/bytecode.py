"""Bytecode caches for processes that are timed.

`pip` leaves compiled modules behind. An image made without them, or an environment that forbids to write them, has
each import compile its modules again, which takes large libraries three times as long: not what is to be measured.
"""

from __future__ import annotations

import os
import tempfile
from functools import cache


def environment() -> dict[str, str]:
    """Of a process that finds modules compiled once another with this environment has imported them."""
    own = {**os.environ, "PYTHONPYCACHEPREFIX": _folder().name}
    own.pop("PYTHONDONTWRITEBYTECODE", None)
    return own


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="ipa-bytecode-")  # gone when this process ends
