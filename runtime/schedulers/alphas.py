"""The noise schedule: how much of the clean latents is left at each training timestep."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ipa.runtime.schedulers.config import SchedulerConfig
from ipa.runtime.schedulers.schedule import Array

Float32s = NDArray[np.float32]

MAX_COSINE_BETA = 0.999  # arXiv:2102.09672, section 3.2


class AlphasCumprod:
    """Product of `1 - beta` up to each training timestep: the share of the clean latents in the variance.

    Rounded to float32 because diffusers' tables are, and models are sampled with those.

    Args:
        config: of the scheduler.
        set_alpha_to_one: whether the end of the run is no noise, rather than the noise of timestep 0.
        rescale_betas_zero_snr: whether the last timestep becomes pure noise.
    Source: arXiv:2006.11239, formula (4).
    """

    def __init__(
        self, config: SchedulerConfig, *, set_alpha_to_one: bool = True, rescale_betas_zero_snr: bool = False
    ) -> None:
        betas = _betas(config)
        if rescale_betas_zero_snr:
            betas = _rescaled_to_zero_snr(betas)
        self.values = _cumprod(np.float32(1) - betas)
        self.final = 1.0 if set_alpha_to_one else float(self.values[0])

    def __getitem__(self, timestep: int) -> float:
        """The share at `timestep`, at the end of the run if that is negative.

        A Python float: numpy's own float64 would turn float32 latents into float64.
        """
        return self.final if timestep < 0 else float(self.values[timestep])

    def add_noise(self, timestep: int, latents: Array, noise: Array) -> Array:
        """Clean latents noised to the level of `timestep`. Source: arXiv:2006.11239, formula (4)."""
        return math.sqrt(self[timestep]) * latents + math.sqrt(1 - self[timestep]) * noise


def _betas(config: SchedulerConfig) -> Float32s:
    count = config.num_train_timesteps
    if config.trained_betas is not None:
        return np.array(config.trained_betas, np.float32)
    if config.beta_schedule == "linear":
        return linspace32(config.beta_start, config.beta_end, count)
    if config.beta_schedule == "scaled_linear":  # linear in the standard deviation: latent diffusion's own
        return linspace32(config.beta_start**0.5, config.beta_end**0.5, count) ** 2
    return _cosine_betas(count)


def _cosine_betas(count: int) -> Float32s:
    """Source: arXiv:2102.09672, formula (17)."""
    alphas_bar = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
    betas = [min(1 - after / before, MAX_COSINE_BETA) for before, after in pairwise(alphas_bar)]
    return np.array(betas, np.float32)


def _rescaled_to_zero_snr(betas: Float32s) -> Float32s:
    """Stretch the schedule so that the last timestep is pure noise. Source: arXiv:2305.08891, algorithm 1."""
    roots = np.sqrt(_cumprod(np.float32(1) - betas))
    first, last = roots[0], roots[-1]
    alphas_bar = ((roots - last) * (first / (first - last))) ** 2
    return np.float32(1) - np.concatenate([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])


def _cumprod(values: Float32s) -> Float32s:
    """As torch.cumprod: the running product in float64, each result rounded."""
    return np.cumprod(values, dtype=np.float64).astype(np.float32)


def linspace32(start: float, end: float, count: int) -> Float32s:
    """As torch.linspace in float32: the step is rounded, and each half counts from its own end with one rounding."""
    if count == 1:
        return np.array([start], np.float32)
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count)
    return np.where(index < count // 2, first + step * index, last - step * (count - 1 - index)).astype(np.float32)
