"""What DDIM, PNDM, DDPM and LCM share: they step between training timesteps, on latents of unit variance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ipa.runtime.schedulers.alphas import AlphasCumprod
from ipa.runtime.schedulers.schedule import Array, State


@dataclass(frozen=True, eq=False)
class DiscreteSchedule:
    """See `Schedule` for the methods.

    Attributes:
        alphas_cumprod: by training timestep.
        timesteps: of each call of the model.
    """

    alphas_cumprod: AlphasCumprod
    timesteps: NDArray[np.int64]
    init_noise_sigma: float = 1.0

    def start(self) -> State:
        return State()

    def scale_model_input(self, index: int, latents: Array) -> Array:
        return latents

    def needs_noise(self, index: int) -> bool:
        return False

    def add_noise(self, index: int, latents: Array, noise: Array) -> Array:
        return self.alphas_cumprod.add_noise(int(self.timesteps[index]), latents, noise)
