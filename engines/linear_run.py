"""A denoising run that is linear between the UNet's calls, so that an engine can do it where its memory is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ipa.engines.engine import Array

MOST_ARRAYS = 8  # of a scheduler's state, latents and all: guided_step.cu holds no more


@dataclass(frozen=True)
class LinearStep:
    """One step of a scheduler: what it makes of its state, the model's output and noise.

    Attributes:
        timestep: training index.
        input_scale: factor of the latents that the model sees.
        weights: (after, before + 2). Each row makes one array of the state after the step, the latents first, from the
            arrays before it, the model's output (guidance applied) and the noise.
        needs_noise: whether it takes fresh standard normal noise.
    """

    timestep: float
    input_scale: float
    weights: NDArray[np.float64]
    needs_noise: bool


@dataclass(frozen=True)
class LinearRun:
    """A whole run.

    Attributes:
        latents: (batch, channels, height, width) float32, to start from.
        steps: in order.
        guidance_scale: the UNet's batch is twice the latents', negatives first, and blended by it; `None`: it is not.
        draw_noise: the next noise, shaped as the latents.
    """

    latents: NDArray[np.float32]
    steps: Sequence[LinearStep]
    guidance_scale: float | None
    draw_noise: Callable[[], NDArray[np.float32]]

    @property
    def halves(self) -> int:
        """How often the latents are in the UNet's batch."""
        return 1 if self.guidance_scale is None else 2


@runtime_checkable
class DenoisingEngine(Protocol):
    """A UNet's engine that keeps the latents in its own memory over the steps."""

    def denoise(self, run: LinearRun, conditions: Callable[[int], Mapping[str, Array]]) -> Iterator[Array]:
        """Denoise step by step.

        Args:
            run: latents and arithmetic.
            conditions: the UNet's other inputs at a step, read-only where they stay over the steps.
        Yields:
            The latents after each step, in arrays of their own.
        Raises:
            EngineError: an array does not fit, or the engine failed.
        """
