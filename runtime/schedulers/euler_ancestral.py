"""Euler's method with ancestral noise. Source: arXiv:2011.13456; k-diffusion's `sample_euler_ancestral`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ipa.runtime.schedulers.checks import check_eta_is_zero, check_start
from ipa.runtime.schedulers.config import ZeroSNRConfig
from ipa.runtime.schedulers.euler import SigmaSchedule, init_noise_sigma
from ipa.runtime.schedulers.schedule import Array, State
from ipa.runtime.schedulers.sigmas import SigmaTable, run_of
from ipa.runtime.schedulers.timesteps import fractional_timesteps


@dataclass(frozen=True, kw_only=True)
class EulerAncestralConfig(ZeroSNRConfig):
    """The levels are always those of the timesteps, and the run ends at 0."""

    PREDICTION_TYPES = ("epsilon", "v_prediction")

    timestep_spacing: str = "linspace"


class EulerAncestralScheduler:
    """Each step goes below the next noise level, and comes up to it with fresh noise.

    Args:
        config: options and noise schedule of the model.
    """

    name: ClassVar[str] = "euler-ancestral"

    def __init__(self, config: EulerAncestralConfig) -> None:
        self.config = config
        self._table = SigmaTable(config)

    def schedule(self, num_inference_steps: int, eta: float = 0.0, start: int = 0) -> EulerAncestralSchedule:
        """The run with that many steps.

        Args:
            num_inference_steps: 1 up to the number of training timesteps.
            eta: 0, the noise of this method is always whole.
            start: step to begin at.
        Raises:
            RequestError: a number is out of range.
        """
        check_eta_is_zero(eta, "Euler ancestral")
        timesteps = fractional_timesteps(self.config, num_inference_steps)
        check_start(start, num_inference_steps)
        sigmas = run_of(self._table.at(timesteps), 0.0)
        noise_sigma = init_noise_sigma(self.config.timestep_spacing, sigmas)
        return EulerAncestralSchedule(self.config.prediction_type, timesteps[start:], sigmas[start:], noise_sigma)


class EulerAncestralSchedule(SigmaSchedule):
    """One run with ancestral noise."""

    def needs_noise(self, index: int) -> bool:
        """Also at the last step, where none is left of it: diffusers draws it there, too."""
        return True

    def step(
        self, index: int, noise_pred: Array, latents: Array, state: State, noise: Array | None = None
    ) -> tuple[Array, State]:
        if noise is None:
            raise ValueError("Euler ancestral takes noise at each step")
        sigma, target = self.sigmas[index], self.sigmas[index + 1]
        # The variance of the noise and that of the lower level add up to that of the target.
        below = target**2 / sigma
        fresh = target * math.sqrt(1 - (target / sigma) ** 2)
        return latents + (below - sigma) * self.slope(index, noise_pred, latents) + fresh * noise, state
