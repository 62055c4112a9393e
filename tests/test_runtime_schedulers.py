"""Schedulers against diffusers', step by step, over many configurations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from scheduler_oracle import (
    BETAS,
    CLASSES,
    CLIPPING,
    FLOAT32_COEFFICIENTS_TOLERANCE,
    FLOAT32_TOLERANCE,
    ORACLE_TOLERANCE,
    SD15,
    SHAPE,
    SPACINGS,
    ZERO_SNR,
    assert_same_run,
    from_config,
    model,
    pair,
)

from ipa.runtime.noise import TorchGenerator
from ipa.runtime.schedulers import Schedule, State, create_scheduler
from ipa.runtime.schedulers.alphas import AlphasCumprod
from ipa.runtime.schedulers.ddim import DDIMConfig
from ipa.runtime.schedulers.pndm import PNDMConfig


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", DDIMConfig.PREDICTION_TYPES)
def test_ddim_options(prediction_type: str, spacing: str, clipping: str, eta: float) -> None:
    config = {"prediction_type": prediction_type, "timestep_spacing": spacing, "beta_schedule": "scaled_linear"}
    schedule, theirs = pair("ddim", config | CLIPPING[clipping], steps=7, eta=eta)
    assert_same_run(schedule, theirs, ORACLE_TOLERANCE, **({"eta": eta} if eta else {}))


@pytest.mark.parametrize("is_final_one", [False, True])
@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("name", CLASSES)
def test_noise_schedules_and_ends(name: str, betas: str, steps_offset: int, is_final_one: bool) -> None:
    config = BETAS[betas] | {"steps_offset": steps_offset, "set_alpha_to_one": is_final_one, "clip_sample": False}
    assert_same_run(*pair(name, config, steps=6), ORACLE_TOLERANCE)


@pytest.mark.parametrize("steps", [4, 5, 9])  # 1000 // 9 is odd: half an interval is rounded
@pytest.mark.parametrize("skip_prk_steps", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PNDMConfig.PREDICTION_TYPES)
def test_pndm_options(prediction_type: str, spacing: str, skip_prk_steps: bool, steps: int) -> None:
    config = SD15 | {
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "skip_prk_steps": skip_prk_steps,
    }
    assert_same_run(*pair("pndm", config, steps), ORACLE_TOLERANCE)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", CLASSES)
def test_very_few_steps(name: str, steps: int) -> None:
    assert_same_run(*pair(name, SD15, steps), ORACLE_TOLERANCE)


@pytest.mark.parametrize("eta", [0.0, 0.9])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr(prediction_type: str, spacing: str, eta: float) -> None:
    """Both on our table: `test_rescaled_table_of_alphas` compares the tables and says why they differ here."""
    config = SD15 | ZERO_SNR | {"prediction_type": prediction_type, "timestep_spacing": spacing}
    schedule, theirs = pair("ddim", config, steps=8, eta=eta)
    values = AlphasCumprod(DDIMConfig.from_dict(config), rescale_betas_zero_snr=True).values
    theirs.alphas_cumprod = torch.from_numpy(values).double()
    theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
    assert_same_run(schedule, theirs, ORACLE_TOLERANCE, **({"eta": eta} if eta else {}))


def test_full_variance_from_pure_noise_is_finite() -> None:
    """The variance then leaves exactly 0 for the direction; rounded below 0, its root is NaN in diffusers' float64."""
    schedule = create_scheduler("ddim", SD15 | ZERO_SNR).schedule(8, eta=1.0)
    ones = np.ones(SHAPE)
    latents, _ = schedule.step(0, ones, ones, schedule.start(), ones)
    alpha_prev = AlphasCumprod(DDIMConfig.from_dict(SD15 | ZERO_SNR), rescale_betas_zero_snr=True)[999 - 125]
    expected = -np.sqrt(alpha_prev) + np.sqrt(1 - alpha_prev)  # v of 1 means clean latents of -1
    np.testing.assert_allclose(latents, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "change", "steps", "eta"),
    [
        ("ddim", {}, 50, 0.0),
        ("ddim", {}, 50, 1.0),
        ("ddim", {}, 10, 0.5),
        ("ddim", ZERO_SNR, 20, 0.0),
        ("pndm", {}, 50, 0.0),
        ("pndm", {"skip_prk_steps": False}, 20, 0.0),
    ],
    ids=str,
)
def test_diffusers_as_it_comes(name: str, change: dict[str, Any], steps: int, eta: float) -> None:
    """Without the widened table, in float64 and in float32."""
    config = SD15 | change
    schedule = create_scheduler(name, config).schedule(steps, eta=eta)
    for dtype, tolerance in ((np.float64, FLOAT32_COEFFICIENTS_TOLERANCE), (np.float32, FLOAT32_TOLERANCE)):
        theirs = from_config(name, config, steps)
        assert_same_run(schedule, theirs, tolerance, dtype, **({"eta": eta} if eta else {}))


def test_variance_noise_in_the_order_of_diffusers() -> None:
    """One draw for the start, then one a step, all from one generator."""
    schedule, theirs = create_scheduler("ddim", SD15).schedule(9, eta=0.8), DDIMScheduler.from_config(SD15)
    theirs.set_timesteps(9)
    ours, generator = TorchGenerator(4), torch.Generator("cpu").manual_seed(4)
    latents, expected = ours.randn(SHAPE), torch.randn(SHAPE, generator=generator)
    state = schedule.start()
    for index, timestep in enumerate(schedule.timesteps.tolist()):
        noise_pred = model(latents, timestep, index)
        theirs_pred = torch.from_numpy(model(expected.numpy(), timestep, index))
        assert schedule.needs_noise(index)
        latents, state = schedule.step(index, noise_pred, latents, state, ours.randn(SHAPE))
        expected = theirs.step(theirs_pred, timestep, expected, eta=0.8, generator=generator).prev_sample
    scale = expected.abs().max().item()
    np.testing.assert_allclose(latents, expected.numpy(), rtol=0, atol=FLOAT32_TOLERANCE * scale)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("name", "skip_prk_steps"), [("ddim", True), ("pndm", True), ("pndm", False)])
def test_timesteps_for_1_to_50_steps(name: str, skip_prk_steps: bool, spacing: str) -> None:
    config = SD15 | {"timestep_spacing": spacing, "skip_prk_steps": skip_prk_steps}
    ours, theirs = create_scheduler(name, config), CLASSES[name].from_config(config)
    for steps in range(1 if skip_prk_steps else 4, 51):
        theirs.set_timesteps(steps)
        np.testing.assert_array_equal(ours.schedule(steps).timesteps, theirs.timesteps.numpy(), err_msg=f"{steps}")


def test_trailing_spacing_never_visits_timestep_minus_one() -> None:
    """diffusers' list for 61 steps has 62 entries, the last -1."""
    config = SD15 | {"timestep_spacing": "trailing"}
    theirs = DDIMScheduler.from_config(config)
    theirs.set_timesteps(61)
    assert theirs.timesteps[-1] == -1
    ours = create_scheduler("ddim", config).schedule(61).timesteps
    np.testing.assert_array_equal(ours, theirs.timesteps.numpy()[:-1])


@pytest.mark.parametrize("betas", BETAS)
def test_table_of_alphas(betas: str) -> None:
    """Equal to the last bit where torch.linspace uses fused multiply-adds; elsewhere its betas are off by one."""
    ours = AlphasCumprod(DDIMConfig.from_dict(BETAS[betas])).values
    theirs = DDIMScheduler.from_config(BETAS[betas]).alphas_cumprod.numpy()
    assert ours.dtype == np.float32
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        np.testing.assert_array_equal(ours, theirs)
    else:
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("betas", BETAS)
def test_rescaled_table_of_alphas(betas: str) -> None:
    """torch.sqrt (MKL's) is off by one unit in the last place for one value in six; differences of roots magnify it."""
    ours = AlphasCumprod(DDIMConfig.from_dict(BETAS[betas]), rescale_betas_zero_snr=True).values
    theirs = DDIMScheduler.from_config(BETAS[betas], rescale_betas_zero_snr=True).alphas_cumprod.numpy()
    assert ours[-1] == theirs[-1] == 0
    np.testing.assert_allclose(np.sqrt(ours), np.sqrt(theirs), rtol=0, atol=5e-7)


def noise_for(schedule: Schedule, index: int) -> np.ndarray | None:
    return np.ones(SHAPE, np.float32) if schedule.needs_noise(index) else None


@pytest.mark.parametrize("name", CLASSES)
def test_a_step_is_a_function(name: str) -> None:
    """Same arguments, same result; nothing is written to; a run can go on from any of its states."""
    schedule = create_scheduler(name, SD15 | {"skip_prk_steps": False}).schedule(6)
    latents, state = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32), schedule.start()
    seen: list[tuple[np.ndarray, np.ndarray, State, np.ndarray]] = []
    for index, timestep in enumerate(schedule.timesteps.tolist()):
        noise_pred = model(latents, timestep, index)
        for array in (noise_pred, latents):
            array.flags.writeable = False
        after, next_state = schedule.step(index, noise_pred, latents, state, noise_for(schedule, index))
        seen.append((noise_pred, latents, state, after))
        latents, state = after, next_state
    for index in reversed(range(len(seen))):
        noise_pred, latents, state, after = seen[index]
        again, _ = schedule.step(index, noise_pred, latents, state, noise_for(schedule, index))
        np.testing.assert_array_equal(again, after)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("clipping", CLIPPING)
def test_dtype_is_kept(clipping: str, dtype: Any) -> None:
    """Also by a step alone, whose inputs are no results of earlier steps."""
    for prediction_type in DDIMConfig.PREDICTION_TYPES:
        config = CLIPPING[clipping] | {"prediction_type": prediction_type}
        schedule = create_scheduler("ddim", config).schedule(3, eta=0.5)
        ones = np.ones(SHAPE, dtype)
        assert schedule.step(0, ones, ones, schedule.start(), ones)[0].dtype == dtype
