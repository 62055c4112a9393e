"""Random draws of adapter training, and the loss that is made of them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from ipa.trainer.adapter import training_loss
from ipa.trainer.draws import Draws, Sampler, dropped_conditions
from ipa.trainer.examples import EncodedBatch


def sampler(**changed: Any) -> Sampler:
    fields = {
        "seed": 0,
        "batch_size": 4,
        "rank": 0,
        "world_size": 1,
        "drop_image": 0.05,
        "drop_text": 0.05,
        "drop_both": 0.05,
        "timestep_bias": 0.0,
        "num_train_timesteps": 1000,
        "latent_shape": (4, 2, 2),
    }
    return Sampler(**(fields | changed))


def test_every_epoch_holds_every_record_once_in_its_own_order() -> None:
    batches = sampler(batch_size=3).indices(0, 20, dataset_size=10)
    indices = [index for batch in batches for index in batch]
    epochs = [indices[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_a_batch_may_be_larger_than_the_data_set() -> None:
    assert [sorted(batch) for batch in sampler(batch_size=6).indices(0, 1, dataset_size=2)] == [[0, 0, 0, 1, 1, 1]]


def test_draws_depend_on_seed_and_step_alone() -> None:
    later = list(sampler().indices(7, 9, 100))
    assert later == list(sampler().indices(0, 9, 100))[7:]
    assert later != list(sampler(seed=1).indices(7, 9, 100))
    one, same, other = sampler().draws(5), sampler().draws(5), sampler(seed=1).draws(5)
    assert np.array_equal(one.noise, same.noise) and np.array_equal(one.timesteps, same.timesteps)
    assert not np.array_equal(one.noise, other.noise)
    assert not np.array_equal(one.noise, sampler().draws(6).noise)
    assert not np.array_equal(one.noise, one.latent_noise)


def test_two_processes_draw_what_one_draws() -> None:
    whole = sampler(batch_size=4)
    halves = [sampler(batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    assert list(whole.indices(0, 5, 9)) == [
        first + second for first, second in zip(halves[0].indices(0, 5, 9), halves[1].indices(0, 5, 9), strict=True)
    ]
    for name in ("is_image_dropped", "is_text_dropped", "timesteps", "latent_noise", "noise"):
        parts = [getattr(half.draws(3), name) for half in halves]
        assert np.array_equal(np.concatenate(parts), getattr(whole.draws(3), name))


def test_drops_exclude_each_other_and_are_counted_exactly() -> None:
    uniform = np.array([0.0, 0.124, 0.125, 0.249, 0.25, 0.374, 0.375, 0.999])
    image, text = dropped_conditions(uniform, 0.125, 0.125, 0.125)
    assert image.tolist() == [True, True, False, False, True, True, False, False]
    assert text.tolist() == [False, False, True, True, True, True, False, False]


def test_drop_rates_over_many_samples() -> None:
    draws = sampler(batch_size=40_000, latent_shape=(1, 1, 1)).draws(0)
    image, text = draws.is_image_dropped, draws.is_text_dropped
    # each is binomial with 40,000 draws at 5 %: 5 standard deviations are 0.54 %
    for which in (image & ~text, ~image & text, image & text):
        assert abs(which.mean() - 0.05) < 0.0055
    assert (image & ~text).sum() == 2027  # of seed 0: the streams must not move under resumed runs


def test_timesteps_are_uniform_or_biased() -> None:
    uniform = sampler(batch_size=20_000, latent_shape=(1, 1, 1)).draws(0).timesteps
    assert uniform.min() == 0 and uniform.max() == 999
    assert abs(uniform.mean() - 499.5) < 5 * 288.7 / math.sqrt(20_000)
    biased = sampler(batch_size=20_000, latent_shape=(1, 1, 1), timestep_bias=1.0).draws(0).timesteps
    # density proportional to t: mean 2/3, standard deviation sqrt(1/18) of 1000
    assert abs(biased.mean() - 666.2) < 5 * 235.7 / math.sqrt(20_000)


class FakeExamples:
    """Knows every caption's states: the caption's length in every place."""

    size = 3

    def text_states(self, captions: list[str]) -> torch.Tensor:
        return torch.stack([torch.full((2, 3), float(len(caption))) for caption in captions])

    def batches(self, order: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_targets_and_drops(prediction_type: str) -> None:
    """A model that predicts zero has the target's mean square as its loss; it also sees what was dropped."""
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.register_to_config(prediction_type=prediction_type)
    base: Any = SimpleNamespace(
        noise_scheduler=scheduler, vae=SimpleNamespace(config=SimpleNamespace(scaling_factor=0.5))
    )
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(3, 4, 2, 2, generator=generator), torch.rand(3, 4, 2, 2, generator=generator)
    batch = EncodedBatch(mean, std, torch.ones(3, 5), ["cat", "house", "x"])
    random = np.random.default_rng(0)
    draws = Draws(
        is_image_dropped=np.array([True, False, True]),
        is_text_dropped=np.array([False, False, True]),
        timesteps=np.array([0, 500, 999]),
        latent_noise=random.standard_normal((3, 4, 2, 2), dtype=np.float32),
        noise=random.standard_normal((3, 4, 2, 2), dtype=np.float32),
    )
    seen: list[torch.Tensor] = []

    def model(*tensors: torch.Tensor) -> torch.Tensor:
        seen.extend(tensors)
        return torch.zeros_like(tensors[0])

    loss = training_loss(model, base, batch, FakeExamples(), draws)
    noisy, timesteps, text_states, image_embeds = seen
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha = np.cumprod(1 - betas)[[0, 500, 999]][:, None, None, None]
    latents = 0.5 * (mean.numpy() + std.numpy() * draws.latent_noise)
    expected_noisy = alpha**0.5 * latents + (1 - alpha) ** 0.5 * draws.noise
    target = draws.noise if prediction_type == "epsilon" else alpha**0.5 * draws.noise - (1 - alpha) ** 0.5 * latents
    np.testing.assert_allclose(noisy.numpy(), expected_noisy, rtol=1e-4, atol=1e-5)  # float32 cumulative product
    assert loss.item() == pytest.approx(float(np.mean(target**2)), rel=1e-4)
    assert timesteps.tolist() == [0, 500, 999]
    assert text_states[:, 0, 0].tolist() == [3, 5, 0]
    assert image_embeds[:, 0].tolist() == [0, 1, 0]
