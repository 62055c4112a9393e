"""Schedulers against diffusers', step by step, over many configurations.

The oracle runs diffusers' scheduler in float64, with its float32 table of alphas widened to float64 like ours: then
both do the same arithmetic and agree to 1e-13 of the largest latent. Unwidened, diffusers computes its coefficients in
float32 (6e-8 each), which shows as up to 1e-6.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from ipa.engines.errors import BundleError, RequestError
from ipa.runtime.noise import TorchGenerator
from ipa.runtime.schedulers import Schedule, State, create_scheduler
from ipa.runtime.schedulers.alphas import AlphasCumprod
from ipa.runtime.schedulers.config import DDIMConfig, PNDMConfig

ORACLE_TOLERANCE = 1e-13  # 5e-16 seen
FLOAT32_COEFFICIENTS_TOLERANCE = 1e-6
FLOAT32_TOLERANCE = 5e-6  # two float32 computations in different order, over a whole run: 1e-6 seen
SHAPE = (2, 4, 6, 5)
CLASSES = {"ddim": DDIMScheduler, "pndm": PNDMScheduler}

# Stable Diffusion 1.5's own file.
SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
BETAS: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": np.linspace(0.001, 0.01, 300).tolist(), "num_train_timesteps": 300},
    "short": {"beta_schedule": "scaled_linear", "num_train_timesteps": 77},
}
CLIPPING: dict[str, dict[str, Any]] = {
    "unclipped": {"clip_sample": False},
    "clipped": {"clip_sample": True, "clip_sample_range": 1.5},
    "thresholded": {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0},
}
ZERO_SNR = {
    "_class_name": "DDIMScheduler",
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}
SPACINGS = ("leading", "linspace", "trailing")


def model(latents: np.ndarray, timestep: int, index: int) -> np.ndarray:
    """A stand-in for the UNet: depends on latents and timestep, and on the call so that history matters."""
    random = np.random.default_rng(index).standard_normal(latents.shape).astype(latents.dtype)
    return np.tanh(latents[:, ::-1]) * latents.dtype.type(1 - timestep / 2000) + random


def widened(scheduler: Any) -> Any:
    """diffusers' scheduler with its table in float64."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


def assert_same_run(
    schedule: Schedule, theirs: Any, tolerance: float, dtype: Any = np.float64, **step_options: Any
) -> None:
    """Both from the same noise to the end, each on its own latents, compared after every step."""
    assert schedule.timesteps.dtype == np.int64
    np.testing.assert_array_equal(schedule.timesteps, theirs.timesteps.numpy())
    assert schedule.init_noise_sigma == theirs.init_noise_sigma
    random = np.random.default_rng(0)
    latents = random.standard_normal(SHAPE).astype(dtype)
    expected, state = torch.from_numpy(latents), schedule.start()
    for index, timestep in enumerate(schedule.timesteps.tolist()):
        noise = random.standard_normal(SHAPE).astype(dtype) if schedule.needs_noise(index) else None
        extra = step_options | ({} if noise is None else {"variance_noise": torch.from_numpy(noise)})
        noise_pred = model(schedule.scale_model_input(index, latents), timestep, index)
        latents, state = schedule.step(index, noise_pred, latents, state, noise)
        theirs_pred = torch.from_numpy(model(expected.numpy(), timestep, index))
        expected = theirs.step(theirs_pred, timestep, expected, **extra).prev_sample
        assert latents.dtype == dtype
        difference = np.abs(latents - expected.numpy()).max() / np.abs(expected.numpy()).max()
        assert difference <= tolerance, f"step {index}, timestep {timestep}: {difference}"


def pair(name: str, config: dict[str, Any], steps: int, eta: float = 0.0) -> tuple[Schedule, Any]:
    """Our schedule and diffusers' scheduler for the same configuration, the latter in float64."""
    theirs = widened(CLASSES[name].from_config(config))
    theirs.set_timesteps(steps)
    return create_scheduler(name, config).schedule(steps, eta=eta), theirs


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


@pytest.mark.parametrize("prediction_type", DDIMConfig.PREDICTION_TYPES)
def test_ddim_use_clipped_model_output(prediction_type: str) -> None:
    config = {"prediction_type": prediction_type}
    theirs = widened(DDIMScheduler.from_config(config))
    theirs.set_timesteps(6)
    scheduler = create_scheduler("ddim", config)
    schedule = scheduler.schedule(6, use_clipped_model_output=True)  # type: ignore[call-arg]
    assert_same_run(schedule, theirs, ORACLE_TOLERANCE, use_clipped_model_output=True)


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
        theirs = CLASSES[name].from_config(config)
        theirs.set_timesteps(steps)
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
        after, next_state = schedule.step(index, noise_pred, latents, state)
        seen.append((noise_pred, latents, state, after))
        latents, state = after, next_state
    for index in reversed(range(len(seen))):
        noise_pred, latents, state, after = seen[index]
        np.testing.assert_array_equal(schedule.step(index, noise_pred, latents, state)[0], after)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("clipping", CLIPPING)
def test_dtype_is_kept(clipping: str, dtype: Any) -> None:
    """Also by a step alone, whose inputs are no results of earlier steps."""
    for prediction_type in DDIMConfig.PREDICTION_TYPES:
        config = CLIPPING[clipping] | {"prediction_type": prediction_type}
        schedule = create_scheduler("ddim", config).schedule(3, eta=0.5)
        ones = np.ones(SHAPE, dtype)
        assert schedule.step(0, ones, ones, schedule.start(), ones)[0].dtype == dtype


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    "saved_by",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_any_saved_file_gives_what_from_config_gives(saved_by: str, name: str, tmp_path: Path) -> None:
    """`--scheduler ddim` on the bundle of a model that came with another scheduler."""
    getattr(diffusers, saved_by)(beta_schedule="scaled_linear").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert_same_config(create_scheduler(name, config), CLASSES[name].from_config(config))


@pytest.mark.parametrize(("loaded_as", "name"), [(PNDMScheduler, "ddim"), (DDIMScheduler, "pndm")])
def test_live_configs_forget_the_other_classes_defaults(loaded_as: Any, name: str) -> None:
    """As when diffusers' user writes `DDIMScheduler.from_config(pipeline.scheduler.config)`."""
    for file in (SD15, {"beta_schedule": "scaled_linear"}):
        live = loaded_as.from_config(file).config
        assert_same_config(create_scheduler(name, live), CLASSES[name].from_config(live))


def assert_same_config(ours: Any, theirs: Any) -> None:
    for key, value in vars(ours.config).items():
        assert value == theirs.config[key], key


@pytest.mark.parametrize(("class_name", "name"), [("DDIMScheduler", "ddim"), ("PNDMScheduler", "pndm")])
def test_without_a_name_the_files_own_scheduler_is_used(class_name: str, name: str) -> None:
    config = SD15 | {"_class_name": class_name}
    assert type(create_scheduler(None, config)) is type(create_scheduler(name, config))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown scheduler 'euler', expected one of ddim, pndm"):
        create_scheduler("euler", SD15)


@pytest.mark.parametrize("class_name", ["EulerDiscreteScheduler", None])
def test_a_file_of_another_scheduler_asks_for_a_choice(class_name: str | None) -> None:
    with pytest.raises(BundleError, match=r"_class_name is .*choose one with --scheduler ddim or pndm"):
        create_scheduler(None, SD15 | {"_class_name": class_name})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid', expected one of linear, "),
        ({"timestep_spacing": "log"}, "timestep_spacing is 'log', expected one of leading, "),
        ({"prediction_type": "flow"}, "prediction_type is 'flow', expected one of epsilon, "),
        ({"use_karras_sigmas": True}, "use_karras_sigmas is True, expected false"),
        ({"shift": 3.0}, "unknown key 'shift'"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps is '1000', expected a value of type int"),
        ({"num_train_timesteps": True}, "num_train_timesteps is True, expected a value of type int"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0, expected 1 or more"),
        ({"steps_offset": -1}, "steps_offset is -1, expected 0 or more"),
        ({"beta_end": float("nan")}, "beta_end is nan, expected a number between 0 and 1"),
        ({"set_alpha_to_one": 1}, "set_alpha_to_one is 1, expected a value of type bool"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas is (0.1, 0.2), expected a list of 1000 numbers"),
        ({"trained_betas": "0.1"}, "trained_betas is '0.1', expected null or a list of numbers"),
        ({"trained_betas": [2.0] * 1000}, "expected numbers above 0, up to 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("name", CLASSES)
def test_bad_configurations_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError) as error:
        create_scheduler(name, SD15 | change)
    assert str(error.value).startswith("scheduler_config.json: ")
    assert message in str(error.value)


def test_pndm_cannot_predict_the_sample() -> None:
    with pytest.raises(BundleError, match="prediction_type is 'sample', expected one of epsilon, v_prediction"):
        create_scheduler("pndm", {"prediction_type": "sample"})


def test_a_quantile_out_of_range_is_refused() -> None:
    with pytest.raises(BundleError, match=r"dynamic_thresholding_ratio is 99.5, expected a number from 0 to 1"):
        create_scheduler("ddim", {"dynamic_thresholding_ratio": 99.5})


def test_noise_prediction_from_pure_noise_is_refused() -> None:
    """It divides by zero; with leading spacing the run begins before that timestep."""
    config = SD15 | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(BundleError, match="timestep 999 is pure noise"):
        create_scheduler("ddim", config).schedule(10)
    assert create_scheduler("ddim", config | {"timestep_spacing": "leading"}).schedule(10).timesteps[0] == 901
    with pytest.raises(BundleError, match="timestep 9 is pure noise"):
        create_scheduler(
            "pndm", {"num_train_timesteps": 10, "trained_betas": [0.1] * 9 + [1.0], "timestep_spacing": "trailing"}
        ).schedule(5)


@pytest.mark.parametrize(("name", "steps"), list(product(CLASSES, [0, -1, 1001])))
def test_bad_step_counts_are_refused(name: str, steps: int) -> None:
    with pytest.raises(RequestError, match=f"--steps is {steps}, expected a whole number from 1 to 1000"):
        create_scheduler(name, SD15).schedule(steps)


def test_an_offset_past_the_last_timestep_is_refused() -> None:
    with pytest.raises(RequestError, match=r"--steps is 1000, too many: .*use fewer steps"):
        create_scheduler("ddim", SD15).schedule(1000)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_runge_kutta_needs_four_steps(steps: int) -> None:
    with pytest.raises(RequestError, match=f"--steps is {steps}, expected 4 or more"):
        create_scheduler("pndm", SD15 | {"skip_prk_steps": False}).schedule(steps)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_eta_out_of_range_is_refused(eta: float) -> None:
    with pytest.raises(RequestError, match=f"--eta is {eta}, expected a number from 0 to 1"):
        create_scheduler("ddim", SD15).schedule(5, eta=eta)


def test_pndm_refuses_eta() -> None:
    with pytest.raises(RequestError, match=r"--eta is 0.5, but PNDM adds no noise"):
        create_scheduler("pndm", SD15).schedule(5, eta=0.5)


@pytest.mark.parametrize(("name", "eta", "has_noise"), [("ddim", 0.0, True), ("ddim", 1.0, False), ("pndm", 0.0, True)])
def test_noise_where_none_belongs_is_a_mistake_of_the_caller(name: str, eta: float, has_noise: bool) -> None:
    schedule, ones = create_scheduler(name, SD15).schedule(5, eta=eta), np.ones(SHAPE, np.float32)
    with pytest.raises(ValueError, match="noise"):
        schedule.step(0, ones, ones, schedule.start(), ones if has_noise else None)
