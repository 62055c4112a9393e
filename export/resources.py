"""What building an engine will take, and whether this machine has it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ipa.engines.errors import EngineError
from ipa.engines.machine import available_memory

_GIB = 2**30
# Measured with TensorRT-RTX 1.7.1 on SD1.5's graphs in FP16: the builder holds the weights several times over.
_MEMORY_FACTOR, _MEMORY_BASE = 3.8, 0.7 * _GIB
_DISK_FACTOR, _DISK_BASE = 1.2, 0.1 * _GIB
_SECONDS_BASE, _SECONDS_PER_GIB = 8, 20


def predicted_memory(weights: int) -> int:
    """Bytes of memory that building needs for a graph with so many bytes."""
    return int(_MEMORY_FACTOR * weights + _MEMORY_BASE)


def predicted_seconds(weights: int) -> float:
    """About how long building takes on two cores."""
    return _SECONDS_BASE + _SECONDS_PER_GIB * weights / _GIB


def check_resources(component: str, weights: int, folder: Path, at_once: int = 1) -> None:
    """Refuse a build that memory or disk cannot hold.

    Args:
        component: for the message.
        weights: bytes of the graph and its data.
        folder: where the plan will lie.
        at_once: builds that run at the same time.
    Raises:
        EngineError: with what is needed and what there is.
    """
    memory, available = predicted_memory(weights) * at_once, available_memory()
    if available is not None and memory > available:
        advice = "build with --jobs 1" if at_once > 1 else "build on a machine with more, or end other programs"
        raise EngineError(
            f"{component}: building needs about {memory / _GIB:.1f} GiB of memory, {available / _GIB:.1f} GiB "
            f"are available; {advice}"
        )
    disk, free = (_DISK_FACTOR * weights + _DISK_BASE) * 2, shutil.disk_usage(folder).free
    if disk > free:
        raise EngineError(
            f"{component}: building needs about {disk / _GIB:.1f} GiB of disk in {os.fspath(folder)}, "
            f"{free / _GIB:.1f} GiB are free; make room, or name another folder with --cache"
        )
