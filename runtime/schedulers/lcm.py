"""Latent consistency sampling, as an LCM-LoRA in an ordinary UNet needs it. Source: arXiv:2310.04378."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ipa.engines.errors import RequestError
from ipa.runtime.schedulers.alphas import AlphasCumprod
from ipa.runtime.schedulers.checks import check_eta_is_zero, check_first_timestep, check_start
from ipa.runtime.schedulers.clipping import clipped
from ipa.runtime.schedulers.config import ClippingConfig, bad_option
from ipa.runtime.schedulers.discrete import DiscreteSchedule
from ipa.runtime.schedulers.predictions import predicted_clean
from ipa.runtime.schedulers.schedule import Array, State

SIGMA_DATA = 0.5  # standard deviation of the data. Source: arXiv:2303.01469


@dataclass(frozen=True, kw_only=True)
class LCMConfig(ClippingConfig):
    """What LCM adds. Its timesteps are those of its training: `timestep_spacing` and `steps_offset` have no part in it.

    Attributes:
        original_inference_steps: of the solver that it was distilled from; a run takes some of their timesteps.
        timestep_scaling: how fast the weight of the latents themselves falls with the timestep.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    clip_sample: bool = False
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.original_inference_steps <= self.num_train_timesteps:
            expected = f"a whole number from 1 to num_train_timesteps, {self.num_train_timesteps}"
            raise bad_option("original_inference_steps", self.original_inference_steps, expected)


class LCMScheduler:
    """Each step predicts the clean latents, and noises them to the next timestep.

    Args:
        config: options and noise schedule of the model.
    """

    name: ClassVar[str] = "lcm"

    def __init__(self, config: LCMConfig) -> None:
        self.config = config
        self._alphas_cumprod = AlphasCumprod(config, rescale_betas_zero_snr=config.rescale_betas_zero_snr)

    def schedule(self, num_inference_steps: int, eta: float = 0.0, start: int = 0) -> LCMSchedule:
        """The run with that many steps.

        Args:
            num_inference_steps: 1 up to `original_inference_steps`; made for 1 to 8.
            eta: 0, the noise of this method is always whole.
            start: step to begin at.
        Raises:
            RequestError: a number is out of range.
            BundleError: the model predicts noise, and at the first timestep there is nothing else.
        """
        check_eta_is_zero(eta, "LCM")
        most = self.config.original_inference_steps
        if not 1 <= num_inference_steps <= most:
            raise RequestError(
                f"--steps is {num_inference_steps}, expected a whole number from 1 to {most}, the scheduler's "
                "original_inference_steps"
            )
        check_start(start, num_inference_steps)
        original = np.arange(most, 0, -1, dtype=np.int64) * (self.config.num_train_timesteps // most) - 1
        chosen = np.floor(np.linspace(0, most, num_inference_steps, endpoint=False)).astype(np.int64)
        timesteps = original[chosen][start:]
        first = int(timesteps[0])
        check_first_timestep(self.config.prediction_type, first, self._alphas_cumprod[first])
        return LCMSchedule(self._alphas_cumprod, timesteps, config=self.config)


@dataclass(frozen=True, eq=False, kw_only=True)
class LCMSchedule(DiscreteSchedule):
    """One run of LCM."""

    config: LCMConfig

    def needs_noise(self, index: int) -> bool:
        return index < len(self.timesteps) - 1

    def step(
        self, index: int, noise_pred: Array, latents: Array, state: State, noise: Array | None = None
    ) -> tuple[Array, State]:
        if (noise is not None) != self.needs_noise(index):
            raise ValueError("LCM takes noise at each step but the last")
        timestep = int(self.timesteps[index])
        alpha = self.alphas_cumprod[timestep]
        prediction_type = self.config.prediction_type
        clean = predicted_clean(prediction_type, noise_pred, latents, math.sqrt(alpha), math.sqrt(1 - alpha))
        clean = clipped(self.config, clean)

        # The boundary condition: at timestep 0 the latents are clean. Source: arXiv:2303.01469.
        scaled = timestep * self.config.timestep_scaling
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        denoised = scaled / math.sqrt(scaled**2 + SIGMA_DATA**2) * clean + skip * latents
        return denoised if noise is None else self.add_noise(index + 1, denoised, noise), state
