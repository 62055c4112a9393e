"""Figures with what chance leaves open: a statistic of repeated measurements and its bootstrap interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Statistic = Callable[..., NDArray[np.float64]]  # as numpy's: of an array along `axis`
RESAMPLES, PARTS = 10_000, 50
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure, and an interval that covers the true one 95 times of 100, as the measurements' own spread has it.

    Attributes:
        value: the statistic of what was measured.
        low, high: ends of the interval; of one measurement both are the value.
        count: how many measurements there were.
    """

    value: float
    low: float
    high: float
    count: int

    @property
    def width(self) -> float:
        """From end to end."""
        return self.high - self.low

    def covers(self, value: float) -> bool:
        """Whether `value` is not ruled out."""
        return self.low <= value <= self.high


def bootstrap(values: Sequence[float], statistic: Statistic = np.median, seed: int = 0) -> Interval:
    """A statistic with its percentile bootstrap interval.

    Args:
        values: independent measurements, at least one.
        statistic: `numpy.median`, `numpy.mean` or alike, with `axis`.
        seed: of the resampling.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, section 13.3.
    """
    measured = np.asarray(values, np.float64)
    rng, size = np.random.default_rng(seed), len(measured)
    found = [  # a part at a time: all resamples of thousands of values would take gigabytes
        statistic(measured[rng.integers(size, size=(RESAMPLES // PARTS, size))], axis=1) for _ in range(PARTS)
    ]
    low, high = np.quantile(np.concatenate(found), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(statistic(measured, axis=0)), float(low), float(high), len(measured))
