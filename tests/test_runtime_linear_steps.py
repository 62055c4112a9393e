"""Schedulers as weights: applied to arrays they make the run that the scheduler itself makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scheduler_oracle import CLIPPING, SD15, SHAPE, ZERO_SNR, model

from ipa.engines.linear_run import MOST_ARRAYS
from ipa.runtime.linear_steps import linear_steps
from ipa.runtime.schedulers import create_scheduler

TOLERANCE = 1e-9  # relative, float64: the same sums in another order, where the first steps' factors are some thousand

RUNS: list[tuple[str, dict[str, Any], float]] = [
    ("ddim", {}, 0.0),
    ("ddim", {}, 1.0),
    ("ddim", ZERO_SNR, 0.5),
    ("pndm", {}, 0.0),
    ("pndm", {"prediction_type": "v_prediction"}, 0.0),
    ("pndm", {"skip_prk_steps": False}, 0.0),
    ("euler", {"use_karras_sigmas": True}, 0.0),
    ("euler-ancestral", {}, 0.0),
    ("dpm++-2m", {"use_karras_sigmas": True}, 0.0),
    ("dpm++-2m", {"solver_order": 3}, 0.0),
    ("unipc", {}, 0.0),
    ("unipc", {"solver_order": 3, "predict_x0": False}, 0.0),
    ("lcm", {}, 0.0),
    ("ddpm", {}, 0.0),
]


# Runge-Kutta steps cannot begin in the middle.
LATE = [(*run, 2) for run in RUNS if run[1].get("skip_prk_steps", True)]


@pytest.mark.parametrize(("name", "change", "eta", "start"), [*((*run, 0) for run in RUNS), *LATE], ids=str)
def test_weights_make_the_same_run(name: str, change: dict[str, Any], eta: float, start: int) -> None:
    schedule = create_scheduler(name, SD15 | change).schedule(9, eta=eta, start=start)
    steps = linear_steps(schedule)
    assert steps is not None
    random = np.random.default_rng(0)
    latents = schedule.init_noise_sigma * random.standard_normal(SHAPE)
    arrays, state = latents[None], schedule.start()
    for index, step in enumerate(steps):
        sample = schedule.scale_model_input(index, latents)
        np.testing.assert_allclose(step.input_scale * arrays[0], sample, rtol=0, atol=TOLERANCE * np.abs(sample).max())
        assert step.timestep == schedule.timesteps[index]
        noise_pred = model(sample, step.timestep, index)
        noise = random.standard_normal(SHAPE) if step.needs_noise else None
        latents, state = schedule.step(index, noise_pred, latents, state, noise)
        given = np.stack([*arrays, noise_pred, np.full(SHAPE, np.inf) if noise is None else noise])
        weights = step.weights if noise is not None else step.weights[:, :-1]  # without noise its column is never read
        arrays = np.tensordot(weights, given[: weights.shape[1]], axes=1)
        np.testing.assert_allclose(arrays[0], latents, rtol=0, atol=TOLERANCE * np.abs(latents).max())


@pytest.mark.parametrize("change", [CLIPPING["clipped"], CLIPPING["thresholded"]], ids=str)
@pytest.mark.parametrize("name", ["ddim", "lcm", "ddpm"])
def test_clipping_is_not_linear(name: str, change: dict[str, Any]) -> None:
    assert linear_steps(create_scheduler(name, SD15 | change).schedule(4)) is None


def test_a_state_that_is_too_large() -> None:
    assert linear_steps(create_scheduler("unipc", SD15 | {"solver_order": MOST_ARRAYS}).schedule(30)) is None
