"""Noise levels as k-diffusion counts them: sigma is the noise's share over that of the clean latents.

    latents / signal = clean + sigma * noise,   signal = 1 / sqrt(sigma**2 + 1)

Tables and levels are rounded to float32 as diffusers' are, levels between the table's are float64 until then.
Source: arXiv:2206.00364, table 1 and formula (5).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ipa.runtime.schedulers.alphas import AlphasCumprod, Float32s, linspace32
from ipa.runtime.schedulers.config import SigmaConfig, ZeroSNRConfig

Float64s = NDArray[np.float64]

RHO = 7  # arXiv:2206.00364
LEAST_ALPHA = 2.0**-24  # instead of 0 after the rescaling to zero SNR, so that no sigma is infinite


class SigmaTable:
    """Sigma of each training timestep.

    Args:
        config: of the scheduler.
    """

    def __init__(self, config: ZeroSNRConfig) -> None:
        alphas = AlphasCumprod(config, rescale_betas_zero_snr=config.rescale_betas_zero_snr).values.copy()
        if config.rescale_betas_zero_snr:
            alphas[-1] = LEAST_ALPHA
        self.values: Float32s = np.sqrt((1 - alphas) / alphas)
        self.log_snrs: Float32s = np.log(np.sqrt(alphas)) - np.log(np.sqrt(1 - alphas))  # half of them: lambda
        self._logs: Float32s = np.log(self.values)

    @property
    def min(self) -> float:
        """Of the first training timestep."""
        return float(self.values[0])

    @property
    def max(self) -> float:
        """Of the last training timestep."""
        return float(self.values[-1])

    def at(self, timesteps: NDArray[np.integer] | Float32s) -> Float64s:
        """Sigmas at timesteps, between two of the table's in proportion."""
        return np.interp(timesteps, np.arange(len(self.values)), self.values)

    def log_spaced(self, count: int) -> Float64s:
        """From the largest to the smallest, `count` of them, their logarithms evenly spaced in float32."""
        return np.exp(linspace32(float(self._logs[-1]), float(self._logs[0]), count)).astype(np.float64)

    def timesteps_of(self, sigmas: Float64s) -> Float64s:
        """Where in the table they are, between two timesteps in proportion of the logarithms."""
        logs = np.log(np.maximum(sigmas, 1e-10))
        below = np.clip(np.searchsorted(self._logs, logs, side="right") - 1, 0, len(self._logs) - 2)
        low, high = self._logs[below], self._logs[below + 1]
        share = np.clip((low - logs) / (low - high), 0, 1)
        timesteps: Float64s = (1 - share) * below + share * (below + 1)
        return timesteps


def respaced(config: SigmaConfig, largest: float, smallest: float, count: int) -> Float64s | None:
    """The `count` levels that the configuration asks for, falling; `None` if it asks for those of timesteps.

    Args:
        config: of the scheduler.
        largest, smallest: ends of the range.
        count: how many.
    Source: arXiv:2206.00364, formula (5), for karras; arXiv:2206.00927 for uniform log-SNR ("lu").
    """
    if config.use_karras_sigmas:
        first, last = largest ** (1 / RHO), smallest ** (1 / RHO)
        karras: Float64s = (first + np.linspace(0, 1, count) * (last - first)) ** RHO
        return karras
    if config.use_exponential_sigmas or getattr(config, "use_lu_lambdas", False):
        exponential: Float64s = np.exp(np.linspace(math.log(largest), math.log(smallest), count))
        return exponential
    return None


def run_of(sigmas: Float64s, last: float) -> tuple[float, ...]:
    """The levels of a run and its end, in float32 precision.

    Python floats: numpy's own float64 would turn float32 latents into float64.
    """
    return tuple(np.append(sigmas, last).astype(np.float32).tolist())


def signal_and_sigma(sigma: float) -> tuple[float, float]:
    """Shares of the clean latents and of the noise whose squares add up to 1."""
    signal = 1 / math.sqrt(sigma**2 + 1)
    return signal, sigma * signal
