"""A scheduler's arithmetic as weights, for engines that do it themselves. The schedulers stay the only source of it.

A step of a linear method adds up multiples of what it is given. Given unit vectors in place of pictures, one for each
array, it returns those multiples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ipa.engines.linear_run import MOST_ARRAYS, LinearStep
from ipa.runtime.schedulers.schedule import Array, Schedule, State

_LARGE = 1e4  # far outside of what clipping and thresholding leave alone
_TOLERANCE = 1e-9


def linear_steps(schedule: Schedule) -> list[LinearStep] | None:
    """The whole run as weights.

    Returns:
        `None` if a step is not linear, as it clips the clean latents or thresholds them, or if the state is too large.
    """
    steps = []
    state = schedule.start()
    for index, timestep in enumerate(schedule.timesteps):
        weights, after = _weights(schedule, index, state, 1.0)
        scaled, _ = _weights(schedule, index, state, _LARGE)
        if not np.allclose(scaled, weights * _LARGE, rtol=_TOLERANCE, atol=_TOLERANCE * _LARGE):
            return None
        if len(weights) > MOST_ARRAYS:
            return None
        scale = float(schedule.scale_model_input(index, np.ones(1))[0])
        steps.append(LinearStep(float(timestep), scale, weights, schedule.needs_noise(index)))
        state = after
    return steps


def _weights(schedule: Schedule, index: int, like: State, size: float) -> tuple[Array, State]:
    """What a step makes of unit vectors of this size, one row for each array after it, and the state it leaves."""
    count = 1 + len(_arrays(like))
    # Each unit vector lies along the batch: thresholding looks at one picture at a time.
    latents, *others = size * np.eye(count + 2).reshape(count + 2, count + 2, 1, 1, 1)
    *arrays, noise_pred, noise = others
    given = noise if schedule.needs_noise(index) else None
    latents, state = schedule.step(index, noise_pred, latents, _filled(like, arrays), given)
    return np.stack([latents, *_arrays(state)]).reshape(-1, count + 2), state


def _arrays(state: State) -> list[Array]:
    anchor = [] if state.anchor is None else [state.anchor]
    return [*state.outputs, *state.slopes, *anchor]


def _filled(like: State, arrays: Sequence[Array]) -> State:
    """A state as `like` with other arrays."""
    rest = iter(arrays)
    return State(
        tuple(next(rest) for _ in like.outputs),
        tuple(next(rest) for _ in like.slopes),
        None if like.anchor is None else next(rest),
    )
