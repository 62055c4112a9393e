"""Which training timesteps a run of few steps visits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ipa.engines.errors import RequestError
from ipa.runtime.schedulers.config import SchedulerConfig


def spaced_timesteps(config: SchedulerConfig, num_inference_steps: int) -> NDArray[np.int64]:
    """Training timesteps from noisy to clean, (num_inference_steps,).

    With `trailing` spacing and some counts (61 and 103 of 1000, for example) float rounding makes diffusers' list one
    longer, with a last timestep of -1 that reads the noisiest entry of its table. That entry is left out here.

    Raises:
        RequestError: more steps than timesteps, or fewer than one.
    Source: arXiv:2305.08891, table 2.
    """
    count = config.num_train_timesteps
    if not 1 <= num_inference_steps <= count:
        raise RequestError(f"--steps is {num_inference_steps}, expected a whole number from 1 to {count}")
    if config.timestep_spacing == "linspace":
        return np.linspace(0, count - 1, num_inference_steps).round()[::-1].astype(np.int64)
    if config.timestep_spacing == "trailing":
        stride = count / num_inference_steps
        return np.arange(count, 0, -stride)[:num_inference_steps].round().astype(np.int64) - 1
    timesteps = np.arange(num_inference_steps, dtype=np.int64)[::-1] * (count // num_inference_steps)
    timesteps += config.steps_offset
    if timesteps[0] >= count:
        raise RequestError(
            f"--steps is {num_inference_steps}, too many: the scheduler's steps_offset of {config.steps_offset} "
            f"moves the first timestep to {timesteps[0]}, past {count - 1}; use fewer steps"
        )
    return timesteps
