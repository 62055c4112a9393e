"""DPM-Solver++, multistep. Source: arXiv:2211.01095; diffusers' `DPMSolverMultistepScheduler` for the options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ipa.runtime.schedulers.checks import check_eta_is_zero, check_start
from ipa.runtime.schedulers.clipping import thresholded
from ipa.runtime.schedulers.config import bad_option, check_choice
from ipa.runtime.schedulers.multistep import MultistepConfig, MultistepSchedule, check_falling, decay
from ipa.runtime.schedulers.predictions import predicted_clean
from ipa.runtime.schedulers.schedule import Array, State
from ipa.runtime.schedulers.sigmas import SigmaTable, respaced, run_of, signal_and_sigma
from ipa.runtime.schedulers.timesteps import solver_timesteps

FEW_STEPS = 15  # below which `lower_order_final` counts


@dataclass(frozen=True, kw_only=True)
class DPMSolverConfig(MultistepConfig):
    """What DPM-Solver++ adds.

    Attributes:
        algorithm_type: always `dpmsolver++`; the stochastic ones and the first DPM-Solver are not supported.
        euler_at_final: whether the last step is of first order however many there are.
        use_lu_lambdas: whether lambda rises evenly.
        lambda_min_clipped: timesteps with a lambda below this are not visited, where the timesteps decide the levels.
        variance_type: whether the model predicts a variance, too: never.
    """

    MAX_ORDER = 3
    SOLVER_TYPES = ("midpoint", "heun")
    ALIASES: ClassVar = {
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
    }

    solver_type: str = "midpoint"
    algorithm_type: str = "dpmsolver++"
    euler_at_final: bool = False
    use_lu_lambdas: bool = False
    lambda_min_clipped: float = -math.inf
    variance_type: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("algorithm_type", self.algorithm_type, ("dpmsolver++",))
        if self.variance_type in ("learned", "learned_range"):
            raise bad_option("variance_type", self.variance_type, "null: the UNet has no outputs for a variance")


class DPMSolverScheduler:
    """A linear multistep method for the clean latents in lambda, whose linear part is exact.

    Args:
        config: options and noise schedule of the model.
    """

    def __init__(self, config: DPMSolverConfig) -> None:
        self.config = config
        self._table = SigmaTable(config)

    @property
    def name(self) -> str:
        return "dpm++-2m-karras" if self.config.use_karras_sigmas else "dpm++-2m"

    def schedule(self, num_inference_steps: int, eta: float = 0.0, start: int = 0) -> DPMSolverSchedule:
        """The run with that many steps.

        Args:
            num_inference_steps: 1 up to one less than the number of training timesteps.
            eta: 0, the method has no noise to weigh.
            start: step to begin at.
        Raises:
            RequestError: a number is out of range.
        """
        check_eta_is_zero(eta, "DPM-Solver++")
        config, table = self.config, self._table
        count = config.num_train_timesteps - int(np.searchsorted(table.log_snrs[::-1], config.lambda_min_clipped))
        timesteps = solver_timesteps(config, num_inference_steps, count)
        levels = respaced(config, table.max, table.min, num_inference_steps)
        if levels is None:
            levels = table.at(timesteps)
        else:
            between = table.timesteps_of(levels)
            # diffusers rounds to the nearest only here, and cuts off elsewhere.
            is_rounded = not config.use_exponential_sigmas and config.beta_schedule != "squaredcos_cap_v2"
            timesteps = (between.round() if is_rounded else between).astype(np.int64)
        check_start(start, len(timesteps))
        sigmas = run_of(levels, 0.0 if config.final_sigmas_type == "zero" else table.min)
        check_falling(sigmas, num_inference_steps)
        return DPMSolverSchedule(timesteps[start:], sigmas[start:], start, config=config)


@dataclass(frozen=True, eq=False, kw_only=True)
class DPMSolverSchedule(MultistepSchedule):
    """One run of DPM-Solver++."""

    config: DPMSolverConfig

    def step(
        self, index: int, noise_pred: Array, latents: Array, state: State, noise: Array | None = None
    ) -> tuple[Array, State]:
        if noise is not None:
            raise ValueError("DPM-Solver++ takes no noise")
        prediction_type = self.config.prediction_type
        clean = predicted_clean(prediction_type, noise_pred, latents, *signal_and_sigma(self.sigmas[index]))
        history = (*state.outputs, thresholded(self.config, clean))[-self.config.solver_order :]
        return self._transfer(index, latents, history[-self._order(index) :]), State(history)

    def _order(self, index: int) -> int:
        """Of one step: lower at the beginning, which has no history, and at the end."""
        config, left = self.config, len(self.timesteps) - index
        is_short = config.lower_order_final and self.whole < FEW_STEPS
        order = min(config.solver_order, index + 1)
        if left == 1 and (config.euler_at_final or is_short or config.final_sigmas_type == "zero"):
            return 1
        return min(order, 2) if left == 2 and is_short else order

    def _transfer(self, index: int, latents: Array, history: tuple[Array, ...]) -> Array:
        """Latents at the next level, from the newest predictions of the clean latents, the newest last.

        Source: arXiv:2211.01095, DPM-Solver++(2M) for `midpoint`; diffusers for `heun` and the third order.
        """
        sigma, target = self.sigmas[index], self.sigmas[index + 1]
        if sigma == target:
            return latents
        signal, scale = signal_and_sigma(target)[0], signal_and_sigma(target)[1] / signal_and_sigma(sigma)[1]
        h = decay(sigma, target)
        shrink = math.expm1(-h)
        moved = scale * latents - signal * shrink * history[-1]
        if len(history) == 1:
            return moved
        newest = (history[-1] - history[-2]) * (h / decay(self.sigmas[index - 1], sigma))
        if len(history) == 2:
            weight = -shrink / 2 if self.config.solver_type == "midpoint" else shrink / h + 1
            return moved + signal * weight * newest
        ratio = decay(self.sigmas[index - 1], sigma) / h
        older_ratio = decay(self.sigmas[index - 2], self.sigmas[index - 1]) / h
        change = (newest - (history[-2] - history[-3]) / older_ratio) / (ratio + older_ratio)
        first, second = newest + ratio * change, change
        return moved + signal * (shrink / h + 1) * first - signal * ((shrink + h) / h**2 - 0.5) * second
