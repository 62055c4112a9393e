"""The denoising loop: flat, lazy, in one place. Progress, previews and timing belong to the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipa.engines.engine import Engine
from ipa.engines.linear_run import DenoisingEngine, LinearRun
from ipa.runtime.beginning import Beginning
from ipa.runtime.linear_steps import linear_steps
from ipa.runtime.schedulers import Schedule

Array = NDArray[Any]
Conditions = Callable[[int, NDArray[np.float32], float], Mapping[str, Array]]


@dataclass(frozen=True)
class Step:
    """The state after one step of the loop.

    Attributes:
        index, count: this step, from 0, and how many there are.
        timestep: training index the step started from, 0 to 999; some schedulers go between them.
        latents: (batch, 4, height / 8, width / 8) float32, after the step.
    """

    index: int
    count: int
    timestep: float
    latents: NDArray[np.float32]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance.

    Attributes:
        scale: how far to go from the negative to the positive half, and on.
        rescale: share of the blend, 0 to 1, that gets the positive half's spread back, which a large scale widens.
    """

    scale: float
    rescale: float = 0.0

    def blend(self, noise_pred: Array) -> Array:
        """The two halves of a batch as one.

        Source: arXiv:2207.12598, formula (6); arXiv:2305.08891, section 3.4, for `rescale`.
        """
        negative, positive = np.split(noise_pred, 2)
        blended: Array = negative + np.float32(self.scale) * (positive - negative)
        if self.rescale:
            axes = tuple(range(1, blended.ndim))
            spread = positive.std(axis=axes, keepdims=True) / blended.std(axis=axes, keepdims=True)
            blended *= np.float32(self.rescale) * spread + np.float32(1 - self.rescale)
        return blended


def denoise(
    unet: Engine,
    schedule: Schedule,
    begin: Beginning,
    conditions: Conditions,
    guidance: Guidance | None,
) -> Iterator[Step]:
    """Denoise step by step.

    Where the engine can keep the latents in its own memory and the arithmetic is linear, it does all of it.

    Args:
        unet: opened engine of the component `unet`.
        schedule: timesteps and arithmetic.
        begin: latents to start from, and what stays of a picture.
        conditions: the UNet's other inputs at a step, from its index, the scaled latents and its timestep; with
            guidance of twice the latents' batch, negatives first.
        guidance: `None`: the batch has one half.
    Yields:
        One `Step` after each call of the UNet.
    """
    if isinstance(unet, DenoisingEngine) and (run := _linear_run(schedule, begin, guidance)) is not None:
        yield from _by_engine(unet, run, schedule, conditions)
        return
    halves = 1 if guidance is None else 2
    dtype = unet.spec.inputs[0].dtype
    latents, state = begin.latents, schedule.start()
    for index, timestep in enumerate(schedule.timesteps):
        sample = schedule.scale_model_input(index, latents)
        others = conditions(index, sample, float(timestep))
        if begin.channels is not None:
            sample = np.concatenate([sample, begin.channels], axis=1)
        noise_pred = unet(
            sample=np.concatenate([sample] * halves).astype(dtype, copy=False),
            timestep=np.asarray(timestep, np.float32),
            **others,
        )["noise_pred"].astype(np.float32, copy=False)
        if guidance is not None:
            noise_pred = guidance.blend(noise_pred)
        noise = begin.draw_noise() if schedule.needs_noise(index) else None
        latents, state = schedule.step(index, noise_pred, latents, state, noise)
        if begin.frame is not None:
            latents = begin.frame.put_back(index, schedule, latents)
        yield Step(index, len(schedule.timesteps), float(timestep), latents)


def _linear_run(schedule: Schedule, begin: Beginning, guidance: Guidance | None) -> LinearRun | None:
    """The run's arithmetic for an engine that keeps the latents; `None` if it is more than weighted sums of them."""
    if begin.frame is not None or begin.channels is not None or (guidance is not None and guidance.rescale):
        return None
    steps = linear_steps(schedule)
    if steps is None:
        return None
    return LinearRun(begin.latents, steps, None if guidance is None else guidance.scale, begin.draw_noise)


def _by_engine(unet: DenoisingEngine, run: LinearRun, schedule: Schedule, conditions: Conditions) -> Iterator[Step]:
    latents: NDArray[np.float32] = run.latents  # then, in the loop below, of the step before

    def given(index: int) -> Mapping[str, Array]:
        return conditions(index, schedule.scale_model_input(index, latents), run.steps[index].timestep)

    for index, latents in enumerate(unet.denoise(run, given)):
        yield Step(index, len(run.steps), run.steps[index].timestep, latents)
