"""What every scheduler of ours does as diffusers': a start in the middle, noise, configurations as they come."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from scheduler_oracle import (
    CLASSES,
    FLOAT32_TOLERANCE,
    LEVELS,
    MULTISTEP,
    SD15,
    SHAPE,
    SOLVER_TOLERANCE,
    SPACINGS,
    WITH_NOISE,
    assert_same_run,
    from_config,
    model,
    pair,
)

from ipa.runtime.noise import TorchGenerator
from ipa.runtime.schedulers import create_scheduler

LCM_FLOAT32_TOLERANCE = 5e-5


@pytest.mark.parametrize("start", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    ("name", "extra"),
    [
        *((name, {}) for name in CLASSES),
        ("euler", {"use_karras_sigmas": True}),
        ("dpm++-2m", {"use_karras_sigmas": True}),
        ("dpm++-2m", {"solver_order": 3, "lower_order_final": False}),
        ("unipc", {"solver_order": 3}),
    ],
    ids=str,
)
def test_begin_in_the_middle(name: str, extra: dict[str, Any], start: int) -> None:
    """The image noised to the level of the first call left, then the rest of the run, as in diffusers' pipelines."""
    config = SD15 | extra
    schedule, theirs = pair(name, config, steps=9, start=start)
    whole = create_scheduler(name, config).schedule(9)
    np.testing.assert_array_equal(schedule.timesteps, whole.timesteps[start:])
    random = np.random.default_rng(2)
    clean, noise = random.standard_normal((2, *SHAPE))
    expected = theirs.add_noise(torch.from_numpy(clean), torch.from_numpy(noise), theirs.timesteps[start : start + 1])
    np.testing.assert_allclose(schedule.add_noise(0, clean, noise), expected.numpy(), rtol=1e-12, atol=1e-12)
    assert_same_run(schedule, theirs, SOLVER_TOLERANCE, start=start)


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        *product(CLASSES, ["timesteps"]),
        *product(["euler", *MULTISTEP], ["karras", "exponential"]),
    ],
)
def test_noise_of_every_level(name: str, levels: str) -> None:
    """As inpainting noises the picture after each step; diffusers finds the level by the timestep."""
    schedule, theirs = pair(name, SD15 | LEVELS[levels], steps=6)
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(None)
    random = np.random.default_rng(2)
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-6)):
        clean, noise = random.standard_normal((2, *SHAPE)).astype(dtype)
        for index in range(len(schedule.timesteps)):
            at = theirs.timesteps[index : index + 1]
            expected = theirs.add_noise(torch.from_numpy(clean), torch.from_numpy(noise), at).numpy()
            noised = schedule.add_noise(index, clean, noise)
            assert noised.dtype == dtype
            np.testing.assert_allclose(noised, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("name", WITH_NOISE)
def test_noise_in_the_order_of_diffusers(name: str) -> None:
    """One draw for the start, then one at each step that takes it, all from one generator, as diffusers comes."""
    schedule, theirs = create_scheduler(name, SD15).schedule(9), from_config(name, SD15, 9)
    ours, generator = TorchGenerator(4), torch.Generator("cpu").manual_seed(4)
    latents = ours.randn(SHAPE) * np.float32(schedule.init_noise_sigma)
    expected, state = torch.randn(SHAPE, generator=generator) * theirs.init_noise_sigma, schedule.start()
    for index, timestep in enumerate(theirs.timesteps):
        noise = ours.randn(SHAPE) if schedule.needs_noise(index) else None
        noise_pred = model(schedule.scale_model_input(index, latents), float(timestep), index)
        latents, state = schedule.step(index, noise_pred, latents, state, noise)
        sample = theirs.scale_model_input(expected, timestep)
        theirs_pred = torch.from_numpy(model(sample.numpy(), float(timestep), index))
        expected = theirs.step(theirs_pred, timestep, expected, generator=generator).prev_sample
    np.testing.assert_allclose(latents, expected.numpy(), rtol=0, atol=FLOAT32_TOLERANCE * expected.abs().max().item())
    # Nothing was left out or drawn too much: the next number is the same.
    np.testing.assert_array_equal(ours.randn((16,)), torch.randn(16, generator=generator).numpy())


@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("euler", {}),
        ("euler", {"use_karras_sigmas": True}),
        ("euler-ancestral", {}),
        ("dpm++-2m", {}),
        ("dpm++-2m", {"use_karras_sigmas": True}),
        ("unipc", {}),
        ("lcm", {}),
        ("ddpm", {}),
    ],
    ids=str,
)
def test_diffusers_as_it_comes(name: str, extra: dict[str, Any], steps: int) -> None:
    """In float32. At each step, LCM divides by the signal in the latents, 0.07 at the first: 2e-5 seen."""
    tolerance = LCM_FLOAT32_TOLERANCE if name == "lcm" else FLOAT32_TOLERANCE
    schedule = create_scheduler(name, SD15 | extra).schedule(steps)
    assert_same_run(schedule, from_config(name, SD15 | extra, steps), tolerance, np.float32)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("name", "extra"), [*((name, {}) for name in CLASSES), ("dpm++-2m", {"use_karras_sigmas": True})], ids=str
)
def test_timesteps_for_1_to_50_steps(name: str, extra: dict[str, Any], spacing: str) -> None:
    config = SD15 | extra | {"timestep_spacing": spacing}
    ours = create_scheduler(name, config)
    for steps in range(1, 51):
        theirs = from_config(name, config, steps)
        np.testing.assert_array_equal(ours.schedule(steps).timesteps, theirs.timesteps.numpy(), err_msg=f"{steps}")


def test_dpmsolver_takes_deis_for_dpmsolver() -> None:
    """As diffusers does, with the `solver_type` that goes with it."""
    config = SD15 | {"algorithm_type": "deis", "solver_type": "logrho", "final_sigmas_type": "sigma_min"}
    ours = create_scheduler("dpm++-2m", config).config  # type: ignore[attr-defined]
    theirs = DPMSolverMultistepScheduler.from_config(config).config
    assert (ours.algorithm_type, ours.solver_type) == (theirs.algorithm_type, theirs.solver_type)
