"""What DPM-Solver++ and UniPC share: their levels, and latents of unit variance.

Both count in lambda, the logarithm of signal over noise, and take the predictions for a polynomial of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ipa.engines.errors import RequestError
from ipa.runtime.schedulers.config import SigmaConfig, ThresholdingConfig, bad_option, check_choice
from ipa.runtime.schedulers.schedule import Array, State
from ipa.runtime.schedulers.sigmas import signal_and_sigma


@dataclass(frozen=True, kw_only=True)
class MultistepConfig(SigmaConfig, ThresholdingConfig):
    """What the two share.

    Attributes:
        solver_order: how many predictions a step is made of, 1 up to the class's `MAX_ORDER`.
        solver_type: one of the class's `SOLVER_TYPES`.
        lower_order_final: whether the last steps are of lower order.
    """

    MAX_ORDER: ClassVar[int]
    SOLVER_TYPES: ClassVar[tuple[str, ...]]

    solver_order: int = 2
    solver_type: str
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("solver_type", self.solver_type, self.SOLVER_TYPES)
        if not 1 <= self.solver_order <= self.MAX_ORDER:
            raise bad_option("solver_order", self.solver_order, f"a whole number from 1 to {self.MAX_ORDER}")


def check_falling(sigmas: tuple[float, ...], num_inference_steps: int) -> None:
    """A step between two equal levels divides by zero; only the last may go nowhere.

    Raises:
        RequestError: there are too many steps for the levels to differ.
    """
    if any(after >= before for before, after in pairwise(sigmas[:-1])):
        raise RequestError(f"--steps is {num_inference_steps}, too many: the noise would not fall at each; use fewer")


def decay(sigma: float, target: float) -> float:
    """How far lambda rises between two levels: infinitely far to 0."""
    return math.log(sigma / target) if target > 0 else math.inf


@dataclass(frozen=True, eq=False)
class MultistepSchedule:
    """See `Schedule` for the methods.

    Attributes:
        timesteps: of each call of the model, falling.
        sigmas: noise level of each call, and after it where the last leads.
        begun_at: how many steps of the whole run come before.
    """

    timesteps: NDArray[np.int64]
    sigmas: tuple[float, ...]
    begun_at: int
    init_noise_sigma: float = 1.0

    def start(self) -> State:
        return State()

    def scale_model_input(self, index: int, latents: Array) -> Array:
        return latents

    def needs_noise(self, index: int) -> bool:
        return False

    def add_noise(self, index: int, latents: Array, noise: Array) -> Array:
        signal, sigma = signal_and_sigma(self.sigmas[index])
        return signal * latents + sigma * noise

    @property
    def whole(self) -> int:
        """Steps of the whole run."""
        return self.begun_at + len(self.timesteps)
