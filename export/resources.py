"""What building an engine will take, and whether this machine has it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ipa.engines.errors import EngineError
from ipa.engines.machine import available_memory

_GIB = 2**30
# Measured with TensorRT-RTX 1.7.1 on SD1.5's graphs in FP16: the builder holds the weights several times over.
# The UNet (1640 MiB) took 5738 MiB, 21 s and a plan of 1635 MiB; ViT-H (1205 MiB) 4153 MiB, 11 s, 1213 MiB.
_MEMORY_FACTOR, _MEMORY_BASE = 3.3, 0.5 * _GIB
_DISK_FACTOR, _DISK_BASE = 1.1, 0.05 * _GIB
_SECONDS_PER_GIB, _SECONDS_BASE = 13, 3


@dataclass(frozen=True)
class Prediction:
    """What a build will take, about: bytes of memory and of disk, seconds on two cores."""

    memory: float
    disk: float
    seconds: float

    @classmethod
    def of(cls, weights: int) -> Prediction:
        """For a graph that has so many bytes, with its data."""
        return cls(
            _MEMORY_FACTOR * weights + _MEMORY_BASE,
            _DISK_FACTOR * weights + _DISK_BASE,
            _SECONDS_PER_GIB * weights / _GIB + _SECONDS_BASE,
        )

    def __str__(self) -> str:
        return f"about {self.seconds:.0f} s, {self.memory / _GIB:.1f} GiB of memory, {self.disk / _GIB:.1f} GiB of disk"


def check_resources(predictions: Mapping[str, Prediction], folder: Path, at_once: int = 1) -> None:
    """Refuse builds that memory or disk cannot hold.

    Args:
        predictions: by component.
        folder: where the plans will lie.
        at_once: builds that run at the same time.
    Raises:
        EngineError: with what is needed and what there is.
    """
    largest = sorted(predictions, key=lambda component: predictions[component].memory)[-at_once:]
    if not largest:
        return
    names, available = " and ".join(largest), available_memory()
    memory = sum(predictions[component].memory for component in largest)
    if available is not None and memory > available:
        advice = "build with --jobs 1" if len(largest) > 1 else "build on a machine with more, or end other programs"
        raise EngineError(
            f"{names}: building needs about {memory / _GIB:.1f} GiB of memory, {available / _GIB:.1f} GiB "
            f"are available; {advice}"
        )
    # All plans in the cache, and those that are being built once more as the builder wrote them.
    disk = sum(prediction.disk for prediction in predictions.values())
    disk += sum(predictions[component].disk for component in largest)
    free = shutil.disk_usage(folder).free
    if disk > free:
        raise EngineError(
            f"{len(predictions)} engines: building needs about {disk / _GIB:.1f} GiB of disk in {os.fspath(folder)}, "
            f"{free / _GIB:.1f} GiB are free; make room, or name another folder with --cache"
        )
