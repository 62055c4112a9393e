"""Euler's method in the noise level. Source: arXiv:2206.00364, algorithm 2 without churn; diffusers' options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ipa.runtime.schedulers.checks import check_eta_is_zero, check_start
from ipa.runtime.schedulers.config import SigmaRangeConfig, check_choice
from ipa.runtime.schedulers.schedule import Array, State
from ipa.runtime.schedulers.sigmas import Float64s, SigmaTable, respaced, run_of
from ipa.runtime.schedulers.timesteps import fractional_timesteps

INTERPOLATION_TYPES = ("linear", "log_linear")
TIMESTEP_TYPES = ("discrete", "continuous")


@dataclass(frozen=True, kw_only=True)
class EulerConfig(SigmaRangeConfig):
    """What Euler adds.

    Attributes:
        interpolation_type: whether the levels are those of the timesteps, or evenly spaced in their logarithm.
        timestep_type: whether a model that predicts v is given timesteps, or logarithms of levels.
    """

    interpolation_type: str = "linear"
    timestep_type: str = "discrete"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("interpolation_type", self.interpolation_type, INTERPOLATION_TYPES)
        check_choice("timestep_type", self.timestep_type, TIMESTEP_TYPES)


class EulerScheduler:
    """Each step follows the tangent to the next noise level.

    Args:
        config: options and noise schedule of the model.
    """

    name: ClassVar[str] = "euler"

    def __init__(self, config: EulerConfig) -> None:
        self.config = config
        self._table = SigmaTable(config)

    def schedule(self, num_inference_steps: int, eta: float = 0.0, start: int = 0) -> EulerSchedule:
        """The run with that many steps.

        Args:
            num_inference_steps: 1 up to the number of training timesteps.
            eta: 0, the method has no noise to weigh.
            start: step to begin at.
        Raises:
            RequestError: a number is out of range.
        """
        check_eta_is_zero(eta, "Euler")
        config = self.config
        timesteps = fractional_timesteps(config, num_inference_steps)
        check_start(start, num_inference_steps)
        levels = self._levels(timesteps)
        respaced_levels = respaced(
            config, config.sigma_max or float(levels[0]), config.sigma_min or float(levels[-1]), num_inference_steps
        )
        if respaced_levels is not None:
            levels = respaced_levels
            timesteps = self._table.timesteps_of(levels).astype(np.float32)
        sigmas = run_of(levels, 0.0 if config.final_sigmas_type == "zero" else self._table.min)
        if config.timestep_type == "continuous" and config.prediction_type == "v_prediction":
            timesteps = np.array([0.25 * math.log(sigma) for sigma in sigmas[:num_inference_steps]], np.float32)
        noise_sigma = init_noise_sigma(config.timestep_spacing, sigmas)
        return EulerSchedule(config.prediction_type, timesteps[start:], sigmas[start:], noise_sigma)

    def _levels(self, timesteps: NDArray[np.float32]) -> Float64s:
        """Sigmas before any other spacing."""
        if self.config.interpolation_type == "linear":
            return self._table.at(timesteps)
        # One more than there are timesteps, as in diffusers: the run ends at the smallest of them, not at 0.
        return self._table.log_spaced(len(timesteps) + 1)


def init_noise_sigma(timestep_spacing: str, sigmas: tuple[float, ...]) -> float:
    """Standard deviation of pure noise in latents that are not scaled down to unit variance.

    That of the clean latents counts only for `leading` spacing, whose first timestep is not the last of training.
    """
    largest = max(sigmas)
    return math.sqrt(largest**2 + 1) if timestep_spacing == "leading" else largest


@dataclass(frozen=True, eq=False)
class SigmaSchedule:
    """What Euler's method and its ancestral variant share; see `Schedule` for the methods.

    Attributes:
        prediction_type: what the model predicts.
        timesteps: of each call of the model, falling.
        sigmas: noise level of each call, and after it where the last leads.
        init_noise_sigma: see `init_noise_sigma`.
    """

    prediction_type: str
    timesteps: NDArray[np.float32]
    sigmas: tuple[float, ...]
    init_noise_sigma: float

    def start(self) -> State:
        return State()

    def scale_model_input(self, index: int, latents: Array) -> Array:
        return latents / math.sqrt(self.sigmas[index] ** 2 + 1)

    def add_noise(self, index: int, latents: Array, noise: Array) -> Array:
        return latents + self.sigmas[index] * noise

    def slope(self, index: int, output: Array, latents: Array) -> Array:
        """Change of the latents with the noise level. Source: arXiv:2206.00364, formula (3) and table 1."""
        sigma = self.sigmas[index]
        match self.prediction_type:
            case "epsilon":
                return output
            case "v_prediction":
                return (sigma * latents + math.sqrt(sigma**2 + 1) * output) / (sigma**2 + 1)
            case _:
                return (latents - output) / sigma


class EulerSchedule(SigmaSchedule):
    """One run of Euler's method."""

    def needs_noise(self, index: int) -> bool:
        return False

    def step(
        self, index: int, noise_pred: Array, latents: Array, state: State, noise: Array | None = None
    ) -> tuple[Array, State]:
        if noise is not None:
            raise ValueError("Euler takes no noise")
        slope = self.slope(index, noise_pred, latents)
        return latents + (self.sigmas[index + 1] - self.sigmas[index]) * slope, state
