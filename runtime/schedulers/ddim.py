"""DDIM. Source: arXiv:2010.02502; diffusers' `DDIMScheduler` for the options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ipa.engines.errors import BundleError, RequestError
from ipa.runtime.schedulers.alphas import AlphasCumprod
from ipa.runtime.schedulers.config import DDIMConfig
from ipa.runtime.schedulers.schedule import Array, State
from ipa.runtime.schedulers.timesteps import spaced_timesteps


class DDIMScheduler:
    """Denoising diffusion implicit models: each step predicts the clean latents and adds less noise back.

    Args:
        config: options and noise schedule of the model.
    """

    name: ClassVar[str] = "ddim"

    def __init__(self, config: DDIMConfig) -> None:
        self.config = config
        self._alphas_cumprod = AlphasCumprod(config, config.rescale_betas_zero_snr)

    def schedule(
        self, num_inference_steps: int, eta: float = 0.0, use_clipped_model_output: bool = False
    ) -> DDIMSchedule:
        """The run with that many steps.

        Args:
            num_inference_steps: 1 up to the number of training timesteps.
            eta: weight of the variance noise, 0 to 1. Source: formula (16).
            use_clipped_model_output: derive the noise again from the clipped clean latents, as GLIDE does.
        Raises:
            RequestError: a number is out of range.
            BundleError: the model predicts noise, and at the first timestep there is nothing else.
        """
        if not 0 <= eta <= 1:
            raise RequestError(f"--eta is {eta}, expected a number from 0 to 1")
        timesteps = spaced_timesteps(self.config, num_inference_steps)
        if self.config.prediction_type == "epsilon" and self._alphas_cumprod[int(timesteps[0])] == 0:
            raise BundleError(
                f"scheduler_config.json: timestep {timesteps[0]} is pure noise (rescale_betas_zero_snr), where a model "
                "of prediction_type 'epsilon' says nothing; set timestep_spacing to 'leading' or the option to false"
            )
        stride = self.config.num_train_timesteps // num_inference_steps
        return DDIMSchedule(self.config, self._alphas_cumprod, timesteps, stride, eta, use_clipped_model_output)


@dataclass(frozen=True, eq=False)
class DDIMSchedule:
    """One run of DDIM; see `Schedule` for its methods.

    Attributes:
        alphas_cumprod: by training timestep.
        timesteps: (num_inference_steps,), falling.
        stride: how far a step goes, in training timesteps.
    """

    config: DDIMConfig
    alphas_cumprod: AlphasCumprod
    timesteps: NDArray[np.int64]
    stride: int
    eta: float
    use_clipped_model_output: bool
    init_noise_sigma: float = 1.0

    def start(self) -> State:
        return State()

    def scale_model_input(self, index: int, latents: Array) -> Array:
        return latents

    def needs_noise(self, index: int) -> bool:
        return self.eta > 0

    def step(
        self, index: int, noise_pred: Array, latents: Array, state: State, noise: Array | None = None
    ) -> tuple[Array, State]:
        if (noise is not None) != self.needs_noise(index):
            raise ValueError(f"step {index} takes noise exactly if eta is above 0; eta is {self.eta}")
        timestep = int(self.timesteps[index])
        alpha, alpha_prev = self.alphas_cumprod[timestep], self.alphas_cumprod[timestep - self.stride]

        clean, epsilon = self._predictions(noise_pred, latents, alpha)
        clean = self._clipped(clean)
        if self.use_clipped_model_output:
            epsilon = (latents - math.sqrt(alpha) * clean) / math.sqrt(1 - alpha)

        # Formula (16), then (12). Rounding may take the rest of the variance below 0 where eta leaves none.
        variance = self.eta**2 * (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
        direction = math.sqrt(max(0.0, 1 - alpha_prev - variance))
        latents = math.sqrt(alpha_prev) * clean + direction * epsilon
        if noise is not None:
            latents = latents + math.sqrt(variance) * noise
        return latents, state

    def _predictions(self, output: Array, latents: Array, alpha: float) -> tuple[Array, Array]:
        """Clean latents and noise, from whichever the model predicts.

        Source: formula (12) for noise; arXiv:2202.00512, section 4 and appendix D, for v.
        """
        signal, sigma = math.sqrt(alpha), math.sqrt(1 - alpha)
        match self.config.prediction_type:
            case "epsilon":
                return (latents - sigma * output) / signal, output
            case "v_prediction":
                return signal * latents - sigma * output, signal * output + sigma * latents
            case _:
                return output, (latents - signal * output) / sigma

    def _clipped(self, clean: Array) -> Array:
        if self.config.thresholding:
            return self._thresholded(clean)
        if self.config.clip_sample:
            return np.clip(clean, -self.config.clip_sample_range, self.config.clip_sample_range)
        return clean

    def _thresholded(self, clean: Array) -> Array:
        """Dynamic thresholding, picture by picture. Source: arXiv:2205.11487, section 2.3."""
        axes = tuple(range(1, clean.ndim))
        quantile = np.quantile(np.abs(clean), self.config.dynamic_thresholding_ratio, axis=axes, keepdims=True)
        limit = np.minimum(np.maximum(quantile, 1), self.config.sample_max_value).astype(clean.dtype)
        thresholded: Array = np.clip(clean, -limit, limit) / limit
        return thresholded
