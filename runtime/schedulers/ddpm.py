"""DDPM. Source: arXiv:2006.11239; diffusers' `DDPMScheduler` for the options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ipa.runtime.schedulers.alphas import AlphasCumprod
from ipa.runtime.schedulers.checks import check_eta_is_zero, check_first_timestep
from ipa.runtime.schedulers.clipping import clipped
from ipa.runtime.schedulers.config import ClippingConfig, check_choice
from ipa.runtime.schedulers.discrete import DiscreteSchedule
from ipa.runtime.schedulers.predictions import predicted_clean
from ipa.runtime.schedulers.schedule import Array, State
from ipa.runtime.schedulers.timesteps import spaced_timesteps

# diffusers' `fixed_large_log` takes the root of a negative number; `learned` ones need a model with more outputs.
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large")
LEAST_VARIANCE = 1e-20  # diffusers', so that its logarithm is finite


@dataclass(frozen=True, kw_only=True)
class DDPMConfig(ClippingConfig):
    """What DDPM adds.

    Attributes:
        variance_type: of the noise of each step: the true posterior's for clean latents that are known (`fixed_small`)
            or of unit variance (`fixed_large`). `None`, as other schedulers save it, is `fixed_small`. Source: section
            3.2.
    """

    variance_type: str | None = "fixed_small"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variance_type is not None:
            check_choice("variance_type", self.variance_type, VARIANCE_TYPES)


class DDPMScheduler:
    """Denoising diffusion probabilistic models: each step draws from the posterior of the predicted clean latents.

    Args:
        config: options and noise schedule of the model.
    """

    name: ClassVar[str] = "ddpm"

    def __init__(self, config: DDPMConfig) -> None:
        self.config = config
        self._alphas_cumprod = AlphasCumprod(config, rescale_betas_zero_snr=config.rescale_betas_zero_snr)

    def schedule(self, num_inference_steps: int, eta: float = 0.0, start: int = 0) -> DDPMSchedule:
        """The run with that many steps.

        Args:
            num_inference_steps: 1 up to the number of training timesteps.
            eta: 0, the noise of this method is always whole.
            start: step to begin at.
        Raises:
            RequestError: a number is out of range.
            BundleError: the model predicts noise, and at the first timestep there is nothing else.
        """
        check_eta_is_zero(eta, "DDPM")
        timesteps = spaced_timesteps(self.config, num_inference_steps, start)
        first = int(timesteps[0])
        check_first_timestep(self.config.prediction_type, first, self._alphas_cumprod[first])
        return DDPMSchedule(self._alphas_cumprod, timesteps, config=self.config)


@dataclass(frozen=True, eq=False, kw_only=True)
class DDPMSchedule(DiscreteSchedule):
    """One run of DDPM."""

    config: DDPMConfig

    def needs_noise(self, index: int) -> bool:
        return bool(self.timesteps[index] > 0)

    def step(
        self, index: int, noise_pred: Array, latents: Array, state: State, noise: Array | None = None
    ) -> tuple[Array, State]:
        if (noise is not None) != self.needs_noise(index):
            raise ValueError(f"step {index} takes noise exactly if its timestep is above 0: {self.timesteps[index]}")
        alpha = self.alphas_cumprod[int(self.timesteps[index])]
        is_last = index == len(self.timesteps) - 1
        alpha_prev = 1.0 if is_last else self.alphas_cumprod[int(self.timesteps[index + 1])]
        beta = 1 - alpha / alpha_prev  # of the whole step

        prediction_type = self.config.prediction_type
        clean = predicted_clean(prediction_type, noise_pred, latents, math.sqrt(alpha), math.sqrt(1 - alpha))
        clean = clipped(self.config, clean)

        # Formula (7).
        weight_of_clean = math.sqrt(alpha_prev) * beta / (1 - alpha)
        weight_of_latents = math.sqrt(alpha / alpha_prev) * (1 - alpha_prev) / (1 - alpha)
        latents = weight_of_clean * clean + weight_of_latents * latents
        if noise is not None:
            variance = max((1 - alpha_prev) / (1 - alpha) * beta, LEAST_VARIANCE)
            latents = latents + math.sqrt(beta if self.config.variance_type == "fixed_large" else variance) * noise
        return latents, state
