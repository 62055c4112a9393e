"""Two contenders timed in turn, A B B A: their ratio, whatever the machine's speed does meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ipa.benchmarks.intervals import Interval, bootstrap

Block = Callable[[], float]  # runs once; the seconds that it took
AGREEMENT = 0.02
MAX_WARM_UP = 10
CLOSE, MOST_ROUNDS = 0.01, 4  # what `measure_closely` wants, and how many times the rounds it may take for it


@dataclass(frozen=True)
class WarmUp:
    """What ran before the measurement.

    Attributes:
        seconds: of each block.
        is_settled: whether the last two agree within 2 %.
    """

    seconds: tuple[float, ...]
    is_settled: bool


def settle(block: Block, most: int = MAX_WARM_UP) -> WarmUp:
    """Run blocks until two in a row agree within 2 %, at most `most`."""
    seconds = [block()]
    while len(seconds) < most:
        seconds.append(block())
        if abs(seconds[-1] - seconds[-2]) <= AGREEMENT * min(seconds[-2:]):
            return WarmUp(tuple(seconds), True)
    return WarmUp(tuple(seconds), False)


@dataclass(frozen=True)
class Quad:
    """One round A B B A: a drift that is linear over it slows both alike.

    Attributes:
        first, second: seconds of A and of B, two blocks each.
    """

    first: tuple[float, float]
    second: tuple[float, float]

    @property
    def ratio(self) -> float:
        """How many times as fast B is as A."""
        return sum(self.first) / sum(self.second)


def measure(first: Block, second: Block, pairs: int, done: Callable[[], None] = lambda: None) -> list[Quad]:
    """Time two contenders in `pairs` rounds A B B A.

    Args:
        first, second: A and B.
        done: called after each block.
    """

    def timed(block: Block) -> float:
        seconds = block()
        done()
        return seconds

    quads = []
    for _ in range(pairs):
        a, b, b_again, a_again = (timed(block) for block in (first, second, second, first))
        quads.append(Quad((a, a_again), (b, b_again)))
    return quads


def measure_closely(first: Block, second: Block, pairs: int, done: Callable[[], None] = lambda: None) -> list[Quad]:
    """As `measure`, and more rounds until the ratio is known to 1 % either way, at most four times `pairs`.

    For contenders that are nearly alike. The end depends on the interval's width, never on where it lies.
    """
    quads = measure(first, second, pairs, done)
    while len(quads) < MOST_ROUNDS * pairs and ratio(quads).width > 2 * CLOSE:
        quads += measure(first, second, 1)
    return quads


def ratio(quads: Sequence[Quad]) -> Interval:
    """How many times as fast B is as A: the median over the rounds."""
    return bootstrap([quad.ratio for quad in quads])


def second_seconds(quads: Sequence[Quad]) -> Interval:
    """Seconds of B's blocks, the median."""
    return bootstrap([seconds for quad in quads for seconds in quad.second])


def first_blocks(quads: Sequence[Quad]) -> list[float]:
    """Seconds of A's blocks."""
    return [seconds for quad in quads for seconds in quad.first]
