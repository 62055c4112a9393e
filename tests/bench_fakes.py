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


class Multiplier:
    """Keeps a core busy, as a model would."""

    dtype = "float32"

    def __init__(self, side: int, times: int) -> None:
        self._matrix, self._times = np.random.default_rng(0).standard_normal((side, side), np.float32), times
        self.stages: dict[str, Callable[[], object]] = {}

    def block(self) -> tuple[float, None]:
        start = time.perf_counter()
        for _ in range(self._times):
            np.dot(self._matrix, self._matrix)
        return time.perf_counter() - start, None


def dies() -> None:
    """Ends the process without a word to whom it concerns."""
    raise SystemExit("killed, say")
