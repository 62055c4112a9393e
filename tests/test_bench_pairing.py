"""The maths of the speed report, on timings whose truth is known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from ipa.benchmarks.intervals import bootstrap
from ipa.benchmarks.pairing import CLOSE, MAX_WARM_UP, Quad, measure, measure_closely, ratio, second_seconds, settle


def drifting(rng: np.random.Generator, noise: float, drift: float) -> Callable[[float], Callable[[], float]]:
    """A machine whose speed changes by `drift` from block to block; makes blocks of given seconds."""
    clock: Iterator[int] = itertools.count()

    def contender(seconds: float) -> Callable[[], float]:
        return lambda: seconds * (1 + drift * next(clock)) * float(np.exp(noise * rng.standard_normal()))

    return contender


@pytest.mark.parametrize("truth", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("drift", [0.0, 0.05, -0.004])
def test_a_linear_drift_cancels(truth: float, drift: float) -> None:
    contender = drifting(np.random.default_rng(0), 0.0, drift)
    found = ratio(measure(contender(truth * 0.2), contender(0.2), 7))
    assert found.value == pytest.approx(truth, rel=1e-9)
    assert found.count == 7


def test_the_order_is_a_b_b_a() -> None:
    ran: list[str] = []
    blocks = [lambda name=name: (ran.append(name), 1.0)[1] for name in "AB"]
    done: list[int] = []
    measure(*blocks, 2, lambda: done.append(len(ran)))
    assert "".join(ran) == "ABBAABBA"
    assert done == list(range(1, 9))


@pytest.mark.parametrize(("noise", "rounds"), [(0.0, {5}), (0.02, set(range(6, 20))), (0.2, {20})])
def test_a_close_look_takes_the_rounds_that_it_needs(noise: float, rounds: set[int]) -> None:
    contender = drifting(np.random.default_rng(1), noise, 0.002)
    quads = measure_closely(contender(1.01), contender(1.0), 5)
    assert len(quads) in rounds
    assert (ratio(quads).width <= 2 * CLOSE) == (len(quads) < 20)


def test_a_close_look_covers_the_truth_although_it_chooses_its_end() -> None:
    trials, hits = 200, 0
    for seed in range(trials):
        contender = drifting(np.random.default_rng(seed), 0.02, 0.002)
        hits += ratio(measure_closely(contender(1.0), contender(1.0), 5)).covers(1.0)
    assert hits / trials > 0.85  # of medians, see below; the end costs some more


@pytest.mark.parametrize("truth", [1.0, 1.3])
def test_the_interval_covers_the_truth_as_often_as_it_says(truth: float) -> None:
    trials, hits = 200, 0
    for seed in range(trials):
        contender = drifting(np.random.default_rng(seed), 0.05, 0.002)
        hits += ratio(measure(contender(truth), contender(1.0), 9)).covers(truth)
    # 95 % by name; of medians of so few, percentile intervals cover some 2 % less. Four deviations of chance below.
    assert hits / trials > 0.93 - 4 * (0.93 * 0.07 / trials) ** 0.5


def test_a_noisy_neighbour_does_not_turn_a_null_into_a_win() -> None:
    """Another process comes and goes: while it runs, whatever is measured takes up to twice as long."""
    wins = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        busy = False

        def block(rng: np.random.Generator = rng) -> float:
            nonlocal busy
            busy = busy if rng.random() < 0.7 else not busy
            return float((1 + busy * rng.random()) * np.exp(0.01 * rng.standard_normal()))

        wins += not ratio(measure(block, block, 7)).covers(1.0)
    assert wins <= 200 * (0.07 + 4 * (0.07 * 0.93 / 200) ** 0.5)


def test_a_bootstrap_interval_is_that_of_scipy_like_closed_forms() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = bootstrap(list(values), np.mean)
    error = values.std() / 400**0.5
    assert found.value == pytest.approx(values.mean())
    assert [found.low, found.high] == pytest.approx([found.value - 1.96 * error, found.value + 1.96 * error], abs=0.02)


def test_one_measurement_is_its_own_interval() -> None:
    found = bootstrap([2.0])
    assert (found.value, found.low, found.high, found.count) == (2.0, 2.0, 2.0, 1)


def test_seconds_are_those_of_the_second() -> None:
    quads = [Quad((9.0, 9.0), (1.0, 3.0)), Quad((9.0, 9.0), (2.0, 2.0))]
    assert second_seconds(quads).value == 2.0


def test_warm_up_ends_when_two_blocks_agree() -> None:
    times = iter([5.0, 2.0, 1.03, 1.0, 1.01, 1.0])
    warm_up = settle(lambda: next(times))
    assert warm_up.is_settled
    assert warm_up.seconds == (5.0, 2.0, 1.03, 1.0, 1.01)


def test_warm_up_is_bounded() -> None:
    times = itertools.cycle([1.0, 2.0])
    warm_up = settle(lambda: next(times))
    assert not warm_up.is_settled
    assert len(warm_up.seconds) == MAX_WARM_UP
