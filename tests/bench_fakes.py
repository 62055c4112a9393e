"""Contenders whose speed is known, for the tests of `ipa-bench speed`; they run in processes of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


class Sleeper:
    """Takes as long as it is told."""

    dtype = "float32"

    def __init__(self, seconds: float, fails: str = "") -> None:
        if fails == "open":
            raise ValueError("there is no such model")
        self._seconds, self._fails = seconds, fails
        self.stages: dict[str, Callable[[], object]] = {"text": lambda: time.sleep(seconds / 2)}

    def block(self) -> tuple[float, None]:
        if self._fails == "run":
            raise MemoryError("out of memory")
        start = time.perf_counter()
        time.sleep(self._seconds)
        return time.perf_counter() - start, None


class Known(Sleeper):
    """Writes down which process it is in."""

    def __init__(self, seconds: float, pids: str) -> None:
        super().__init__(seconds)
        with Path(pids).open("a") as file:
            file.write(f"{os.getpid()}\n")


class Talker(Sleeper):
    """Prints where answers go."""

    def __init__(self, seconds: float) -> None:
        print("a library says hello")
        super().__init__(seconds)


class Neighboured:
    """Says what its block would take on a machine where another process comes and goes, and leaves in the end.

    All that share the file `clock` share the machine: the file grows by one for each block of any of them.
    """

    dtype = "float32"

    def __init__(self, seconds: float, clock: str, seed: int, leaves: int) -> None:
        rng, most = np.random.default_rng(seed), 1000
        is_busy = (np.cumsum(rng.random(most) < 0.3) % 2 == 0) & (np.arange(most) < leaves)
        noise = np.exp(0.01 * rng.standard_normal(most))
        self._seconds = seconds * (1 + is_busy * rng.uniform(0.5, 1, most)) * noise
        self._clock = Path(clock)
        self.stages: dict[str, Callable[[], object]] = {}

    def block(self) -> tuple[float, None]:
        with self._clock.open("a") as file:
            file.write(".")
            return float(self._seconds[file.tell()]), None


def dies() -> None:
    """Ends the process without a word to whom it concerns."""
    raise SystemExit("killed, say")
