"""DDIM. Source: arXiv:2010.02502; diffusers' `DDIMScheduler` for the options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ipa.engines.errors import RequestError
from ipa.runtime.schedulers.alphas import AlphasCumprod
from ipa.runtime.schedulers.checks import check_first_timestep
from ipa.runtime.schedulers.clipping import clipped
from ipa.runtime.schedulers.config import ClippingConfig
from ipa.runtime.schedulers.discrete import DiscreteSchedule
from ipa.runtime.schedulers.predictions import predicted_clean, predicted_noise
from ipa.runtime.schedulers.schedule import Array, State
from ipa.runtime.schedulers.timesteps import spaced_timesteps


@dataclass(frozen=True, kw_only=True)
class DDIMConfig(ClippingConfig):
    """What DDIM adds.

    Attributes:
        set_alpha_to_one: whether the last step ends at no noise, rather than at the noise of timestep 0.
    """

    set_alpha_to_one: bool = True


class DDIMScheduler:
    """Denoising diffusion implicit models: each step predicts the clean latents and adds less noise back.

    Args:
        config: options and noise schedule of the model.
    """

    name: ClassVar[str] = "ddim"

    def __init__(self, config: DDIMConfig) -> None:
        self.config = config
        self._alphas_cumprod = AlphasCumprod(
            config,
            set_alpha_to_one=config.set_alpha_to_one,
            rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        )

    def schedule(self, num_inference_steps: int, eta: float = 0.0, start: int = 0) -> DDIMSchedule:
        """The run with that many steps.

        Args:
            num_inference_steps: 1 up to the number of training timesteps.
            eta: weight of the variance noise, 0 to 1. Source: formula (16).
            start: step to begin at.
        Raises:
            RequestError: a number is out of range.
            BundleError: the model predicts noise, and at the first timestep there is nothing else.
        """
        if not 0 <= eta <= 1:
            raise RequestError(f"--eta is {eta}, expected a number from 0 to 1")
        timesteps = spaced_timesteps(self.config, num_inference_steps, start)
        first = int(timesteps[0])
        check_first_timestep(self.config.prediction_type, first, self._alphas_cumprod[first])
        stride = self.config.num_train_timesteps // num_inference_steps
        return DDIMSchedule(
            self._alphas_cumprod,
            timesteps,
            config=self.config,
            stride=stride,
            eta=eta,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class DDIMSchedule(DiscreteSchedule):
    """One run of DDIM.

    Attributes:
        stride: how far a step goes, in training timesteps.
    """

    config: DDIMConfig
    stride: int
    eta: float

    def needs_noise(self, index: int) -> bool:
        return self.eta > 0

    def step(
        self, index: int, noise_pred: Array, latents: Array, state: State, noise: Array | None = None
    ) -> tuple[Array, State]:
        if (noise is not None) != self.needs_noise(index):
            raise ValueError(f"step {index} takes noise exactly if eta is above 0; eta is {self.eta}")
        timestep = int(self.timesteps[index])
        alpha, alpha_prev = self.alphas_cumprod[timestep], self.alphas_cumprod[timestep - self.stride]

        prediction = (self.config.prediction_type, noise_pred, latents, math.sqrt(alpha), math.sqrt(1 - alpha))
        clean, epsilon = clipped(self.config, predicted_clean(*prediction)), predicted_noise(*prediction)

        # Formula (16), then (12). Rounding may take the rest of the variance below 0 where eta leaves none.
        variance = self.eta**2 * (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
        direction = math.sqrt(max(0.0, 1 - alpha_prev - variance))
        latents = math.sqrt(alpha_prev) * clean + direction * epsilon
        if noise is not None:
            latents = latents + math.sqrt(variance) * noise
        return latents, state
