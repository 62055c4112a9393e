"""Any number of contenders of one process, timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from tqdm import tqdm


def interleave(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender by round; the order turns around every round. The first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in tqdm(range(rounds + 1), unit="round", disable=None):
        names = list(contenders)[:: 1 if index % 2 else -1]
        for name in names:
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median and range of the ratios within each round."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
