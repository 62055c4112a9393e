"""Large files that were hashed once and not written since, so that the next look at them need not read gigabytes.

Beside such a file lies a small signed one with what the file system said of it then: inode, size, times. Whoever
writes to a file changes its `ctime`, which only an administrator can set back. A failing disk is not noticed so:
this is for finding out what to build again, and what is loaded is always hashed.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from ipa.engines.signed_file import SignedFile

SUFFIX = ".checked"
_TICK = 0.02  # seconds; file times are at most half as coarse


class CheckedFile:
    """One such file."""

    def __init__(self, path: Path, secret: bytes) -> None:
        """Name it.

        Args:
            path: of the large file.
            secret: of the cache that it lies in.
        """
        self._path = path
        self._record = SignedFile(path.with_suffix(SUFFIX), secret, f"checked {path.name}")

    def is_unchanged(self) -> bool:
        """Whether nobody wrote to the file since it was last remembered."""
        return self._record.read() == _identity(self._path.stat())

    def remember(self, status: os.stat_result) -> None:
        """The file was right as of `status`, which was taken before it was looked at."""
        if abs(time.time() - status.st_ctime) < _TICK:
            time.sleep(_TICK)  # what is written from now on has another time
        with suppress(OSError):  # the next look is slower, and no more
            self._record.write(_identity(status))


def _identity(status: os.stat_result) -> bytes:
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}".encode()
