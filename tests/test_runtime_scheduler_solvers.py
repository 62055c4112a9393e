"""Euler, Euler ancestral, DPM-Solver++, UniPC, LCM and DDPM against diffusers', step by step."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scheduler_oracle import (
    CLASSES,
    CLIPPING,
    LEVELS,
    MULTISTEP,
    ORACLE_TOLERANCE,
    SD15,
    SHAPE,
    SOLVER_TOLERANCE,
    SPACINGS,
    ZERO_SNR,
    assert_same_run,
    from_config,
    model,
    pair,
)

from ipa.runtime.schedulers import create_scheduler

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
FINALS = ("zero", "sigma_min")


@pytest.mark.parametrize("final_sigmas_type", FINALS)
@pytest.mark.parametrize("levels", [*LEVELS, "log_linear"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_euler_options(prediction_type: str, spacing: str, levels: str, final_sigmas_type: str) -> None:
    config = SD15 | {
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "final_sigmas_type": final_sigmas_type,
        **LEVELS.get(levels, {"interpolation_type": "log_linear"}),
    }
    assert_same_run(*pair("euler", config, steps=7), ORACLE_TOLERANCE)


@pytest.mark.parametrize(
    "change",
    [
        {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True},
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        {"timestep_type": "continuous"},
        {"use_karras_sigmas": True, "interpolation_type": "log_linear"},
        {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0},
        {"use_exponential_sigmas": True, "sigma_min": 0.002, "sigma_max": 80.0},
        {"sigma_min": 0.1, "sigma_max": 9.0},  # means nothing to the levels of timesteps
    ],
    ids=str,
)
def test_euler_ranges_and_timesteps(change: dict[str, Any]) -> None:
    assert_same_run(*pair("euler", SD15 | change, steps=9), ORACLE_TOLERANCE)


@pytest.mark.parametrize("steps", [1, 2, 30])  # 999 / 29 is no whole number: timesteps with fractions
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_euler_ancestral_options(prediction_type: str, spacing: str, steps: int) -> None:
    config = SD15 | {"prediction_type": prediction_type, "timestep_spacing": spacing}
    assert_same_run(*pair("euler-ancestral", config, steps), ORACLE_TOLERANCE)


@pytest.mark.parametrize("steps", [3, 8, 14, 15, 20])
@pytest.mark.parametrize("lower_order_final", [False, True])
@pytest.mark.parametrize("euler_at_final", [False, True])
@pytest.mark.parametrize("final_sigmas_type", FINALS)
@pytest.mark.parametrize(("solver_order", "solver_type"), list(product((1, 2, 3), ("midpoint", "heun"))))
def test_dpmsolver_orders(
    solver_order: int,
    solver_type: str,
    final_sigmas_type: str,
    euler_at_final: bool,
    lower_order_final: bool,
    steps: int,
) -> None:
    config = SD15 | {
        "solver_order": solver_order,
        "solver_type": solver_type,
        "final_sigmas_type": final_sigmas_type,
        "euler_at_final": euler_at_final,
        "lower_order_final": lower_order_final,
    }
    assert_same_run(*pair("dpm++-2m", config, steps), SOLVER_TOLERANCE)


@pytest.mark.parametrize("steps", [2, 8, 16])
@pytest.mark.parametrize("ends", [("zero", True), ("sigma_min", True), ("sigma_min", False)], ids=str)
@pytest.mark.parametrize("predict_x0", [False, True])
@pytest.mark.parametrize(("solver_order", "solver_type"), list(product((1, 2, 3, 4), ("bh1", "bh2"))))
def test_unipc_orders(
    solver_order: int, solver_type: str, predict_x0: bool, ends: tuple[str, bool], steps: int
) -> None:
    config = SD15 | {
        "solver_order": solver_order,
        "solver_type": solver_type,
        "predict_x0": predict_x0,
        "final_sigmas_type": ends[0],
        "lower_order_final": ends[1],
    }
    schedule, theirs = pair("unipc", config, steps)
    if ends[0] == "zero" and (solver_type == "bh1" or not predict_x0):
        # diffusers multiplies infinity by 0 in the last step: NaN. Ours is left out of the comparison there.
        schedule = create_scheduler("unipc", config).schedule(steps)
        assert_same_run_but_the_last_step(schedule, theirs)
    else:
        assert_same_run(schedule, theirs, SOLVER_TOLERANCE)


def assert_same_run_but_the_last_step(schedule: Any, theirs: Any) -> None:
    """And the last step is DDIM's, which is what first order means: the predicted clean latents."""
    latents = np.random.default_rng(0).standard_normal(SHAPE)
    expected, state = torch.from_numpy(latents), schedule.start()
    for index, timestep in enumerate(schedule.timesteps[:-1].tolist()):
        latents, state = schedule.step(index, model(latents, timestep, index), latents, state)
        expected = theirs.step(torch.from_numpy(model(expected.numpy(), timestep, index)), timestep, expected)[0]
        np.testing.assert_allclose(latents, expected.numpy(), rtol=0, atol=SOLVER_TOLERANCE * np.abs(latents).max())
    index = len(schedule.timesteps) - 1
    noise_pred = model(latents, 0, index)
    final, after = schedule.step(index, noise_pred, latents, state)
    corrected = after.anchor
    if schedule.config.predict_x0:  # the prediction is made before the correction
        np.testing.assert_allclose(final, after.outputs[-1], rtol=0, atol=1e-12 * np.abs(final).max())
    else:
        sigma = schedule.sigmas[index]
        clean = corrected * np.sqrt(1 + sigma**2) - sigma * noise_pred
        np.testing.assert_allclose(final, clean, rtol=0, atol=1e-12 * np.abs(final).max())


@pytest.mark.parametrize("disable_corrector", [[0], [0, 1, 4], list(range(20))], ids=str)
def test_unipc_without_its_corrector(disable_corrector: list[int]) -> None:
    config = SD15 | {"disable_corrector": disable_corrector, "solver_order": 3}
    assert_same_run(*pair("unipc", config, 8), SOLVER_TOLERANCE)
    assert_same_run(*pair("unipc", config, 8, start=3), SOLVER_TOLERANCE, start=3)


@pytest.mark.parametrize("clipping", ["unclipped", "thresholded"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("name", "extra"), [("dpm++-2m", {}), ("unipc", {}), ("unipc", {"predict_x0": False})])
def test_solvers_predictions(
    name: str, extra: dict[str, Any], prediction_type: str, spacing: str, clipping: str
) -> None:
    ends = {"final_sigmas_type": "sigma_min"} if extra else {}  # UniPC for noise cannot end at 0 in diffusers
    config = SD15 | CLIPPING[clipping] | extra | ends
    config |= {"prediction_type": prediction_type, "timestep_spacing": spacing}
    assert_same_run(*pair(name, config, steps=8), SOLVER_TOLERANCE)


@pytest.mark.parametrize("betas", [{}, {"beta_schedule": "squaredcos_cap_v2"}], ids=str)
@pytest.mark.parametrize("final_sigmas_type", FINALS)
@pytest.mark.parametrize("steps", [3, 10, 21])
@pytest.mark.parametrize(
    ("name", "levels"),
    [
        *product(MULTISTEP, LEVELS.values()),
        ("dpm++-2m", {"use_lu_lambdas": True}),
        ("unipc", {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0}),
    ],
    ids=str,
)
def test_solvers_levels(
    name: str, levels: dict[str, Any], steps: int, final_sigmas_type: str, betas: dict[str, Any]
) -> None:
    config = SD15 | betas | levels | {"final_sigmas_type": final_sigmas_type}
    assert_same_run(*pair(name, config, steps), SOLVER_TOLERANCE)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_dpmsolver_leaves_out_timesteps_with_too_little_left(spacing: str) -> None:
    """With `trailing` spacing also steps, as in diffusers."""
    config = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -3.0, "timestep_spacing": spacing}
    schedule, theirs = pair("dpm++-2m", config, steps=20)
    assert schedule.timesteps[0] < 990
    assert len(schedule.timesteps) == (20 if spacing != "trailing" else len(theirs.timesteps))
    assert_same_run(schedule, theirs, SOLVER_TOLERANCE)


def test_a_step_that_goes_nowhere_leaves_the_latents_alone() -> None:
    """Karras sigmas that end at the smallest reach it twice; with `heun` diffusers divides 0 by 0 there."""
    config = SD15 | {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "lower_order_final": False}
    schedule = create_scheduler("dpm++-2m", config | {"solver_type": "heun", "solver_order": 3}).schedule(20)
    assert schedule.sigmas[-1] == schedule.sigmas[-2]  # type: ignore[attr-defined]
    ones = np.ones(SHAPE)
    state = schedule.start()
    for index in range(20):
        before = ones
        ones, state = schedule.step(index, model(ones, 0, index), ones, state)
    np.testing.assert_array_equal(ones, before)
    assert np.isfinite(ones).all()


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("original", [{}, {"original_inference_steps": 77, "timestep_scaling": 1.0}], ids=str)
@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_lcm_options(prediction_type: str, clipping: str, original: dict[str, Any], steps: int) -> None:
    config = CLIPPING[clipping] | original | {"prediction_type": prediction_type}
    assert_same_run(*pair("lcm", config, steps), ORACLE_TOLERANCE)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize(("prediction_type", "spacing"), list(product(PREDICTION_TYPES, SPACINGS)))
def test_ddpm_options(prediction_type: str, spacing: str, clipping: str, variance_type: str) -> None:
    config = {"prediction_type": prediction_type, "timestep_spacing": spacing, "variance_type": variance_type}
    schedule, theirs = pair("ddpm", config | CLIPPING[clipping], 6)
    # No noise belongs to timestep 0, which `trailing` spacing does not visit.
    assert [schedule.needs_noise(index) for index in (0, 5)] == [True, spacing == "trailing"]
    assert_same_run(schedule, theirs, ORACLE_TOLERANCE)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", [name for name in CLASSES if name not in ("ddim", "pndm")])
def test_zero_terminal_snr(name: str, spacing: str) -> None:
    """On our table of alphas: `test_rescaled_table_of_alphas` says why they differ."""
    config = SD15 | ZERO_SNR | {"timestep_spacing": spacing}
    ours, theirs = create_scheduler(name, config), from_config(name, config, 8)
    whole = ours.schedule(8)
    np.testing.assert_array_equal(whole.timesteps, theirs.timesteps.numpy())
    if hasattr(whole, "sigmas"):
        # Differences of roots magnify the last place: 3e-5 in sigma where it is 4096 times the data.
        np.testing.assert_allclose(whole.sigmas, theirs.sigmas.numpy(), rtol=1e-4)
        theirs.sigmas = torch.tensor(whole.sigmas, dtype=torch.float64)
    else:
        theirs.alphas_cumprod = torch.from_numpy(ours._alphas_cumprod.values).double()  # type: ignore[attr-defined]
    assert_same_run(whole, theirs, SOLVER_TOLERANCE)
