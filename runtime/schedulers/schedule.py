"""What every scheduler offers the denoising loop.

    schedule = create_scheduler("ddim", config).schedule(num_inference_steps)
    state = schedule.start()
    for index, timestep in enumerate(schedule.timesteps):
        noise_pred = unet(schedule.scale_model_input(index, latents), timestep)
        noise = draw_noise() if schedule.needs_noise(index) else None
        latents, state = schedule.step(index, noise_pred, latents, state, noise)

A schedule is frozen: what a method remembers between steps is a value that goes in and comes out, so that a run can be
stopped, repeated from the middle, or interleaved with another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

Array = NDArray[Any]  # float32 in use, float64 in tests: the arithmetic keeps the dtype of the latents


@dataclass(frozen=True)
class State:
    """What a method carries from one step to the next; the caller hands it on as it is.

    Attributes:
        outputs: model outputs of earlier timesteps, or the predictions made of them, the newest last.
        slopes: model outputs within the interval that is being crossed in several calls.
        anchor: latents at the beginning of the interval that is being or has just been crossed.
    """

    outputs: tuple[Array, ...] = ()
    slopes: tuple[Array, ...] = ()
    anchor: Array | None = None


class Schedule(Protocol):
    """One run of a scheduler with a given number of steps."""

    @property
    def timesteps(self) -> NDArray[Any]:
        """Training timestep of each call of the model, (calls,) int64, or float32 where a method goes between them.

        A method may visit one twice.
        """

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the latents that a run from pure noise begins with."""

    def start(self) -> State:
        """The state before the first step."""

    def scale_model_input(self, index: int, latents: Array) -> Array:
        """What the model sees of the latents at step `index`."""

    def needs_noise(self, index: int) -> bool:
        """Whether step `index` takes fresh standard normal noise."""

    def step(
        self, index: int, noise_pred: Array, latents: Array, state: State, noise: Array | None = None
    ) -> tuple[Array, State]:
        """Go from `timesteps[index]` to the next one.

        Args:
            index: which step, from 0.
            noise_pred: the model's output, of the shape and dtype of the latents.
            latents: what `scale_model_input` was given.
            state: of the step before, or `start()`.
            noise: standard normal, shaped as the latents, exactly if `needs_noise(index)`.
        Returns:
            The new latents, of the same dtype, and the state for the next step.
        """

    def add_noise(self, index: int, latents: Array, noise: Array) -> Array:
        """Clean latents noised to what step `index` expects.

        Args:
            index: which step, from 0.
            latents: clean.
            noise: standard normal, shaped as the latents.
        Returns:
            Noisy latents of the same dtype; `scale_model_input` comes after.
        """


class Scheduler(Protocol):
    """A sampling method with a model's noise schedule."""

    @property
    def name(self) -> str:
        """As `create_scheduler` takes it."""

    def schedule(self, num_inference_steps: int, eta: float = 0.0, start: int = 0) -> Schedule:
        """The run with that many steps, or the rest of it.

        Args:
            num_inference_steps: 1 up to the number of training timesteps.
            eta: noise added back at each step: 0 is deterministic, 1 is as much as in training.
            start: the run begins at `timesteps[start]`; the indices of its steps begin at 0 all the same.
        Raises:
            RequestError: a number is out of range, or the method has no such option.
            BundleError: the model's noise schedule and prediction type do not allow it.
        """
