"""Every random choice of training, as a function of the seed and the micro step alone.

Nothing depends on what was drawn before, so a resumed run goes on exactly where it stopped, and two processes with
half a batch each draw what one process with the whole batch would.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Names of the independent random streams of one seed.
_ORDER, _DRAWS = 0, 1


@dataclass(frozen=True)
class Draws:
    """Random numbers of one micro step, for this process's samples.

    Attributes:
        is_image_dropped, is_text_dropped: (batch,) which condition is taken away.
        timesteps: (batch,) training timesteps.
        latent_noise: (batch, 4, h, w) standard normal, for the VAE's posterior.
        noise: (batch, 4, h, w) standard normal, what the UNet learns to find.
    """

    is_image_dropped: NDArray[np.bool_]
    is_text_dropped: NDArray[np.bool_]
    timesteps: NDArray[np.int64]
    latent_noise: NDArray[np.float32]
    noise: NDArray[np.float32]


@dataclass(frozen=True)
class Sampler:
    """Draws for one process of a run.

    Attributes:
        seed: of the run.
        batch_size: samples per process and micro step.
        rank, world_size: this process, of how many.
        drop_image, drop_text, drop_both: exclusive probabilities.
        timestep_bias: exponent of the timesteps' density, 0 is uniform.
        num_train_timesteps: of the noise scheduler.
        latent_shape: (channels, h, w).
    """

    seed: int
    batch_size: int
    rank: int
    world_size: int
    drop_image: float
    drop_text: float
    drop_both: float
    timestep_bias: float
    num_train_timesteps: int
    latent_shape: tuple[int, int, int]

    def indices(self, start: int, stop: int, dataset_size: int) -> Iterator[list[int]]:
        """This process's record indices for the micro steps ``start`` to ``stop``.

        Epochs follow each other without a gap or a short batch; every epoch has its own order.
        """
        for micro_step in range(start, stop):
            first = micro_step * self.batch_size * self.world_size + self.rank * self.batch_size
            positions = range(first, first + self.batch_size)
            yield [
                int(epoch_order(self.seed, place // dataset_size, dataset_size)[place % dataset_size])
                for place in positions
            ]

    def draws(self, micro_step: int) -> Draws:
        """The random numbers of a micro step: drawn for all processes, then cut to this one's part."""
        random = np.random.default_rng([_DRAWS, self.seed, micro_step])
        everyone = self.batch_size * self.world_size
        is_image_dropped, is_text_dropped = dropped_conditions(
            random.random(everyone), self.drop_image, self.drop_text, self.drop_both
        )
        # u ** (1 / (1 + b)) has a density proportional to t ** b
        fractions = random.random(everyone) ** (1 / (1 + self.timestep_bias))
        timesteps = np.minimum((fractions * self.num_train_timesteps).astype(np.int64), self.num_train_timesteps - 1)
        latent_noise, noise = random.standard_normal((2, everyone, *self.latent_shape), dtype=np.float32)
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return Draws(is_image_dropped[mine], is_text_dropped[mine], timesteps[mine], latent_noise[mine], noise[mine])


def dropped_conditions(
    uniform: NDArray[np.float64], drop_image: float, drop_text: float, drop_both: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which images and which texts are dropped: one uniform number per sample decides, so the cases exclude each other.

    Source: the official training script; arXiv:2308.06721, section 4.1.2 (5 % each).
    """
    only_image = uniform < drop_image
    only_text = (uniform >= drop_image) & (uniform < drop_image + drop_text)
    both = (uniform >= drop_image + drop_text) & (uniform < drop_image + drop_text + drop_both)
    return only_image | both, only_text | both


@lru_cache(maxsize=2)  # a batch touches at most two epochs, but for data sets smaller than a batch
def epoch_order(seed: int, epoch: int, dataset_size: int) -> NDArray[np.int64]:
    """The order of the records in one epoch."""
    return np.random.default_rng([_ORDER, seed, epoch]).permutation(dataset_size)
