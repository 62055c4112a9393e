"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Give a temporary path beside ``target``; on success it is synced and takes the target's place.

    Args:
        target: the file to write; its folder must exist.
    """
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        sync_file(partial)
        partial.chmod(0o666 & ~_umask())  # mkstemp makes it private; the result is an ordinary file
        partial.replace(target)
        sync_folder(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Force a file's contents to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Force a folder's entries (new names, renames) to the disk."""
    sync_file(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
