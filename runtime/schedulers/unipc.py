"""UniPC. Source: arXiv:2302.04867; diffusers' `UniPCMultistepScheduler` for the options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ipa.runtime.schedulers.checks import check_eta_is_zero, check_start
from ipa.runtime.schedulers.clipping import thresholded
from ipa.runtime.schedulers.config import SigmaRangeConfig, bad_option
from ipa.runtime.schedulers.multistep import (
    MultistepConfig,
    MultistepSchedule,
    check_falling,
    decay,
)
from ipa.runtime.schedulers.predictions import predicted_clean, predicted_noise
from ipa.runtime.schedulers.schedule import Array, State
from ipa.runtime.schedulers.sigmas import SigmaTable, respaced, run_of, signal_and_sigma
from ipa.runtime.schedulers.timesteps import solver_timesteps


@dataclass(frozen=True, kw_only=True)
class UniPCConfig(SigmaRangeConfig, MultistepConfig):
    """What UniPC adds.

    Attributes:
        predict_x0: whether the clean latents are the polynomial, rather than the noise.
        disable_corrector: steps after which the corrector is left out.
        solver_p: always null: another scheduler as the predictor is not supported.
    """

    MAX_ORDER = 9  # diffusers has no limit; nobody goes beyond 4, and the weights' equations become ill-conditioned
    SOLVER_TYPES = ("bh1", "bh2")
    ALIASES: ClassVar = {"solver_type": {"logrho": "bh2", "midpoint": "bh2", "heun": "bh2"}}

    solver_type: str = "bh2"
    predict_x0: bool = True
    disable_corrector: tuple[int, ...] = ()
    solver_p: None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final_sigmas_type == "zero" and self.solver_order > 1 and not self.lower_order_final:
            expected = "true: the last step leads to no noise at all (final_sigmas_type is 'zero'), in first order only"
            raise bad_option("lower_order_final", False, expected)


class UniPCScheduler:
    """Each step predicts by a multistep method, and is corrected once the model has seen where it led.

    Args:
        config: options and noise schedule of the model.
    """

    name: ClassVar[str] = "unipc"

    def __init__(self, config: UniPCConfig) -> None:
        self.config = config
        self._table = SigmaTable(config)

    def schedule(self, num_inference_steps: int, eta: float = 0.0, start: int = 0) -> UniPCSchedule:
        """The run with that many steps.

        Args:
            num_inference_steps: 1 up to one less than the number of training timesteps.
            eta: 0, the method has no noise to weigh.
            start: step to begin at.
        Raises:
            RequestError: a number is out of range.
        """
        check_eta_is_zero(eta, "UniPC")
        config, table = self.config, self._table
        timesteps = solver_timesteps(config, num_inference_steps, config.num_train_timesteps)
        largest, smallest = config.sigma_max or table.max, config.sigma_min or table.min
        levels, end = respaced(config, largest, smallest, num_inference_steps), table.min
        if levels is None:
            levels = table.at(timesteps)
        else:
            between, end = table.timesteps_of(levels), float(levels[-1])
            # diffusers rounds to the nearest only here, and cuts off elsewhere.
            timesteps = (between.round() if config.use_karras_sigmas else between).astype(np.int64)
        check_start(start, len(timesteps))
        sigmas = run_of(levels, 0.0 if config.final_sigmas_type == "zero" else end)
        check_falling(sigmas, num_inference_steps)
        return UniPCSchedule(timesteps[start:], sigmas[start:], start, config=config)


@dataclass(frozen=True, eq=False, kw_only=True)
class UniPCSchedule(MultistepSchedule):
    """One run of UniPC. The state's anchor is the latents that the last step began with, corrected."""

    config: UniPCConfig

    def step(
        self, index: int, noise_pred: Array, latents: Array, state: State, noise: Array | None = None
    ) -> tuple[Array, State]:
        if noise is not None:
            raise ValueError("UniPC takes no noise")
        prediction = self._prediction(index, noise_pred, latents)
        is_corrected = self.begun_at + index - 1 not in self.config.disable_corrector
        if state.anchor is not None and is_corrected:
            latents = self._transfer(index - 1, state.anchor, state.outputs[-self._order(index - 1) :], prediction)
        history = (*state.outputs, prediction)[-self.config.solver_order :]
        return self._transfer(index, latents, history[-self._order(index) :]), State(history, anchor=latents)

    def _order(self, index: int) -> int:
        """Of one step: lower at the beginning, which has no history, and at the end."""
        order = min(self.config.solver_order, index + 1)
        return min(order, len(self.timesteps) - index) if self.config.lower_order_final else order

    def _prediction(self, index: int, output: Array, latents: Array) -> Array:
        arguments = (self.config.prediction_type, output, latents, *signal_and_sigma(self.sigmas[index]))
        if self.config.predict_x0:
            return thresholded(self.config, predicted_clean(*arguments))
        return predicted_noise(*arguments)

    def _transfer(self, index: int, latents: Array, history: tuple[Array, ...], arrived: Array | None = None) -> Array:
        """Latents at the next level.

        Args:
            index: the step that leads there.
            latents: where it began.
            history: predictions up to there, the newest last.
            arrived: the prediction at the next level, for the corrector.
        Source: arXiv:2302.04867, UniP-p and UniC-p with B(h).
        """
        sigma, target = self.sigmas[index], self.sigmas[index + 1]
        if sigma == target:
            return latents
        (signal, noise), (signal_before, noise_before) = signal_and_sigma(target), signal_and_sigma(sigma)
        h = decay(sigma, target)
        rate = -h if self.config.predict_x0 else h
        growth = math.expm1(rate)
        if self.config.predict_x0:
            size = signal
            moved = noise / noise_before * latents - signal * growth * history[-1]
        else:
            size = noise
            # noise * growth, written so that it is finite where the target is no noise at all.
            moved = signal / signal_before * latents - signal * (sigma - target) * history[-1]
        others = list(history[-2::-1])
        ratios = [decay(sigma, self.sigmas[index - 1 - i]) / h for i in range(len(others))]
        if arrived is not None:
            others, ratios = [*others, arrived], [*ratios, 1.0]
        basis = rate if self.config.solver_type == "bh1" else growth
        for ratio, weight, other in zip(ratios, _weights(ratios, rate, basis), others, strict=True):
            moved = moved - (size * basis * weight / ratio) * (other - history[-1])
        return moved


def _weights(ratios: list[float], rate: float, basis: float) -> list[float]:
    """Of the differences between predictions, each divided by its ratio.

    Args:
        ratios: how far away each prediction is in lambda, in steps; 1 is where the step leads.
        rate: length of the step in lambda, negative for clean latents.
        basis: B(h) of the paper.
    With a single difference one half will do for any B(h), as the paper and diffusers have it.
    """
    if len(ratios) <= 1:
        return [0.5] * len(ratios)
    phi, factorial, sums = math.expm1(rate) / rate - 1, 1, []
    for power in range(1, len(ratios) + 1):
        sums.append(phi * factorial / basis)
        factorial *= power + 1
        phi = phi / rate - 1 / factorial
    powers = np.array(ratios)[None] ** np.arange(len(ratios))[:, None]
    weights: list[float] = np.linalg.solve(powers, np.array(sums)).tolist()
    return weights
