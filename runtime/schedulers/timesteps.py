"""Which training timesteps a run of few steps visits. Source: arXiv:2305.08891, table 2."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ipa.engines.errors import RequestError
from ipa.runtime.schedulers.checks import check_start
from ipa.runtime.schedulers.config import SchedulerConfig


def spaced_timesteps(config: SchedulerConfig, num_inference_steps: int, start: int = 0) -> NDArray[np.int64]:
    """Training timesteps from noisy to clean, (num_inference_steps - start,).

    With `trailing` spacing and some counts (61 and 103 of 1000, for example) float rounding makes diffusers' list one
    longer, with a last timestep of -1 that reads the noisiest entry of its table. That entry is left out here.

    Raises:
        RequestError: more steps than timesteps, or fewer than one; or no such start.
    """
    count = config.num_train_timesteps
    _check_steps(num_inference_steps, count)
    check_start(start, num_inference_steps)
    if config.timestep_spacing == "linspace":
        return np.linspace(0, count - 1, num_inference_steps).round()[::-1].astype(np.int64)[start:]
    if config.timestep_spacing == "trailing":
        return _trailing(count, count / num_inference_steps)[start:]
    timesteps = np.arange(num_inference_steps, dtype=np.int64)[::-1] * (count // num_inference_steps)
    return _offset(timesteps, config, num_inference_steps)[start:]


def fractional_timesteps(config: SchedulerConfig, num_inference_steps: int) -> NDArray[np.float32]:
    """As `spaced_timesteps`, but not rounded where the spacing is `linspace`: for the Euler methods.

    Raises:
        RequestError: more steps than timesteps, or fewer than one.
    """
    if config.timestep_spacing == "linspace":
        _check_steps(num_inference_steps, config.num_train_timesteps)
        return np.linspace(0, config.num_train_timesteps - 1, num_inference_steps, dtype=np.float32)[::-1]
    return spaced_timesteps(config, num_inference_steps).astype(np.float32)


def solver_timesteps(config: SchedulerConfig, num_inference_steps: int, count: int) -> NDArray[np.int64]:
    """Training timesteps from noisy to clean for DPM-Solver++ and UniPC.

    With `leading` and `linspace` spacing they are those of one step more, without the cleanest. With `trailing` spacing
    and a `count` below that of all timesteps, there are fewer of them than was asked for, as in diffusers.

    Args:
        config: of the scheduler.
        num_inference_steps: 1 up to one less than the number of timesteps (`trailing`: up to that).
        count: timesteps to choose from: those after may have too little left of the picture.
    Raises:
        RequestError: there are too few to choose from.
    """
    if config.timestep_spacing == "trailing":
        _check_steps(num_inference_steps, count)
        return _trailing(count, config.num_train_timesteps / num_inference_steps)
    _check_steps(num_inference_steps, count - 1)
    if config.timestep_spacing == "linspace":
        return np.linspace(0, count - 1, num_inference_steps + 1).round()[:0:-1].astype(np.int64)
    timesteps = np.arange(num_inference_steps, 0, -1, dtype=np.int64) * (count // (num_inference_steps + 1))
    return _offset(timesteps, config, num_inference_steps)


def _trailing(count: int, stride: float) -> NDArray[np.int64]:
    timesteps = np.arange(count, 0, -stride).round().astype(np.int64) - 1
    return timesteps[timesteps >= 0]


def _offset(timesteps: NDArray[np.int64], config: SchedulerConfig, num_inference_steps: int) -> NDArray[np.int64]:
    """Timesteps of `leading` spacing, moved by the model's offset."""
    moved, last = timesteps + config.steps_offset, config.num_train_timesteps - 1
    if moved[0] > last:
        raise RequestError(
            f"--steps is {num_inference_steps}, too many: the scheduler's steps_offset of {config.steps_offset} "
            f"moves the first timestep to {moved[0]}, past {last}; use fewer steps"
        )
    return moved


def _check_steps(num_inference_steps: int, most: int) -> None:
    if not 1 <= num_inference_steps <= most:
        raise RequestError(f"--steps is {num_inference_steps}, expected a whole number from 1 to {most}")
