"""PNDM. Source: arXiv:2202.09778; diffusers' `PNDMScheduler` for the options and for the start without Runge-Kutta."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ipa.engines.errors import BundleError, RequestError
from ipa.runtime.schedulers.alphas import AlphasCumprod
from ipa.runtime.schedulers.checks import check_eta_is_zero, check_start
from ipa.runtime.schedulers.config import SchedulerConfig
from ipa.runtime.schedulers.discrete import DiscreteSchedule
from ipa.runtime.schedulers.schedule import Array, State
from ipa.runtime.schedulers.timesteps import spaced_timesteps

RUNGE_KUTTA_INTERVALS = 3  # that fill the history of a four-step method
CALLS_PER_INTERVAL = 4

# Adams-Bashforth: weights of the model outputs, the newest first. Source: formula (12) and its lower orders.
MULTISTEP_WEIGHTS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@dataclass(frozen=True, kw_only=True)
class PNDMConfig(SchedulerConfig):
    """What PNDM adds.

    Attributes:
        set_alpha_to_one: whether the last step ends at no noise, rather than at the noise of timestep 0.
        skip_prk_steps: whether the run starts without Runge-Kutta steps, as Stable Diffusion's does.
    """

    PREDICTION_TYPES = ("epsilon", "v_prediction")

    set_alpha_to_one: bool = False
    skip_prk_steps: bool = False


class PNDMScheduler:
    """Pseudo numerical methods for diffusion models: a linear multi-step method on the diffusion's own curve.

    Args:
        config: options and noise schedule of the model.
    """

    name: ClassVar[str] = "pndm"

    def __init__(self, config: PNDMConfig) -> None:
        self.config = config
        self._alphas_cumprod = AlphasCumprod(config, set_alpha_to_one=config.set_alpha_to_one)

    def schedule(self, num_inference_steps: int, eta: float = 0.0, start: int = 0) -> PNDMSchedule:
        """The run with that many steps: one more call of the model without Runge-Kutta steps, nine more with them.

        Args:
            num_inference_steps: 1 (with Runge-Kutta steps: 4) up to the number of training timesteps.
            eta: 0, the method has no noise to weigh.
            start: step to begin at, as diffusers begins: the calls before `timesteps[start]` are left out and the
                first two of the rest cross one interval twice. Where these are two timesteps (`start` above 1), the
                step between them is lost.
        Raises:
            RequestError: a number is out of range.
            BundleError: the noise schedule begins in pure noise.
        """
        check_eta_is_zero(eta, "PNDM")
        timesteps = spaced_timesteps(self.config, num_inference_steps)
        check_start(start, num_inference_steps)
        if self._alphas_cumprod[int(timesteps[0])] == 0:
            raise BundleError(f"scheduler_config.json: timestep {timesteps[0]} is pure noise, PNDM cannot start there")
        stride = self.config.num_train_timesteps // num_inference_steps
        if self.config.skip_prk_steps:
            # The second timestep is visited twice: a first step by Euler's method, corrected by Heun's.
            calls = np.concatenate([timesteps[:2], timesteps[1:2], timesteps[2:]])[start:]
            return PNDMSchedule(self._alphas_cumprod, calls, config=self.config, stride=stride, warm_up_calls=0)
        if num_inference_steps <= RUNGE_KUTTA_INTERVALS:
            raise RequestError(
                f"--steps is {num_inference_steps}, expected {RUNGE_KUTTA_INTERVALS + 1} or more: "
                "this model's PNDM scheduler starts with Runge-Kutta steps; or use --scheduler ddim"
            )
        if start:
            raise RequestError(
                "this model's PNDM scheduler starts with Runge-Kutta steps, which cannot begin in the middle of a run; "
                "use --scheduler ddim"
            )
        starts, ends = timesteps[:RUNGE_KUTTA_INTERVALS], timesteps[1 : RUNGE_KUTTA_INTERVALS + 1]
        middles = ends + stride // 2
        warm_up = np.stack([starts, middles, middles, ends], axis=1).ravel()
        calls = np.concatenate([warm_up, timesteps[RUNGE_KUTTA_INTERVALS:]])
        return PNDMSchedule(self._alphas_cumprod, calls, config=self.config, stride=stride, warm_up_calls=len(warm_up))


@dataclass(frozen=True, eq=False, kw_only=True)
class PNDMSchedule(DiscreteSchedule):
    """One run of PNDM.

    Attributes:
        stride: how far a step goes, in training timesteps.
        warm_up_calls: how many calls at the beginning belong to Runge-Kutta steps.
    """

    config: PNDMConfig
    stride: int
    warm_up_calls: int

    def step(
        self, index: int, noise_pred: Array, latents: Array, state: State, noise: Array | None = None
    ) -> tuple[Array, State]:
        if noise is not None:
            raise ValueError("PNDM takes no noise")
        if index < self.warm_up_calls:
            return self._runge_kutta(index, noise_pred, latents, state)
        if index == 1 and state.anchor is not None:
            return self._heun(noise_pred, state.outputs, state.anchor), State(state.outputs)
        timestep = int(self.timesteps[index])
        outputs = (*state.outputs[1 - len(MULTISTEP_WEIGHTS) :], noise_pred)
        output = _weighted(MULTISTEP_WEIGHTS[len(outputs) - 1], outputs[::-1])
        # Only the first of all calls needs its latents again.
        anchor = latents if index == 0 else None
        return self._transfer(latents, output, timestep, timestep - self.stride), State(outputs, anchor=anchor)

    def _heun(self, noise_pred: Array, outputs: tuple[Array, ...], anchor: Array) -> Array:
        """Cross the first interval again, with the mean of the outputs at its two ends."""
        end = int(self.timesteps[1])
        return self._transfer(anchor, (noise_pred + outputs[-1]) / 2, end + self.stride, end)

    def _runge_kutta(self, index: int, noise_pred: Array, latents: Array, state: State) -> tuple[Array, State]:
        """One of the four calls that cross an interval. Source: formula (13)."""
        interval, call = divmod(index, CALLS_PER_INTERVAL)
        start = int(self.timesteps[interval * CALLS_PER_INTERVAL])
        # The first two calls lead to the middle of the interval, the last two to its end.
        half = 0 if call % 2 else self.stride // 2
        end = int(self.timesteps[index]) - half
        anchor = latents if state.anchor is None else state.anchor
        slopes = (*state.slopes, noise_pred)
        if call < CALLS_PER_INTERVAL - 1:
            outputs = state.outputs if call else (*state.outputs, noise_pred)
            return self._transfer(anchor, noise_pred, start, end), State(outputs, slopes, anchor)
        output = _weighted((1 / 6, 1 / 3, 1 / 3, 1 / 6), slopes)
        return self._transfer(anchor, output, start, end), State(state.outputs)

    def _transfer(self, latents: Array, output: Array, timestep: int, prev_timestep: int) -> Array:
        """Latents at `prev_timestep`. Source: formula (11); arXiv:2202.00512, appendix D, for v."""
        alpha, alpha_prev = self.alphas_cumprod[timestep], self.alphas_cumprod[prev_timestep]
        if self.config.prediction_type == "v_prediction":
            output = math.sqrt(alpha) * output + math.sqrt(1 - alpha) * latents
        scale = math.sqrt(alpha_prev / alpha)
        slope = (alpha_prev - alpha) / (alpha * math.sqrt(1 - alpha_prev) + math.sqrt(alpha * (1 - alpha) * alpha_prev))
        return scale * latents - slope * output


def _weighted(weights: tuple[float, ...], outputs: tuple[Array, ...]) -> Array:
    """Weighted sum in the dtype of the outputs."""
    total = weights[0] * outputs[0]
    for weight, output in zip(weights[1:], outputs[1:], strict=True):
        total = total + weight * output
    return total
