"""Scheduler configurations: read as diffusers reads them, refused where they make no sense."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from scheduler_oracle import CLASSES, SD15, SHAPE, WITH_NOISE

from ipa.engines.errors import BundleError, RequestError
from ipa.runtime.schedulers import create_scheduler


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
    if (saved_by, name) == ("DPMSolverSinglestepScheduler", "unipc"):
        config["lower_order_final"] = True  # without, diffusers' last step gives NaN: refused, and tested below
    theirs = dict(config)
    if (saved_by, name) == ("DEISMultistepScheduler", "dpm++-2m"):
        theirs["algorithm_type"] = "dpmsolver++"  # diffusers takes "deis" for that, then stumbles over another default
    assert_same_config(create_scheduler(name, config), CLASSES[name].from_config(theirs))


@pytest.mark.parametrize(
    ("loaded_as", "name"),
    [
        (PNDMScheduler, "ddim"),
        (DDIMScheduler, "pndm"),
        (PNDMScheduler, "euler"),
        (EulerDiscreteScheduler, "lcm"),
        (DDIMScheduler, "dpm++-2m"),
        (UniPCMultistepScheduler, "ddpm"),
    ],
)
def test_live_configs_forget_the_other_classes_defaults(loaded_as: Any, name: str) -> None:
    """As when diffusers' user writes `DDIMScheduler.from_config(pipeline.scheduler.config)`."""
    for file in (SD15, {"beta_schedule": "scaled_linear"}):
        live = loaded_as.from_config(file).config
        assert_same_config(create_scheduler(name, live), CLASSES[name].from_config(live))


def assert_same_config(ours: Any, theirs: Any) -> None:
    for key, value in vars(ours.config).items():
        assert value == (() if theirs.config[key] == [] else theirs.config[key]), key


@pytest.mark.parametrize("name", CLASSES)
def test_without_a_name_the_files_own_scheduler_is_used(name: str) -> None:
    config = SD15 | {"_class_name": CLASSES[name].__name__}
    assert create_scheduler(None, config).name == create_scheduler(name, config).name == name


def test_karras_sigmas_by_name_or_by_configuration() -> None:
    own = SD15 | {"_class_name": "DPMSolverMultistepScheduler"}
    assert create_scheduler(None, own | {"use_karras_sigmas": True}).name == "dpm++-2m-karras"
    assert create_scheduler("dpm++-2m", own | {"use_karras_sigmas": True}).name == "dpm++-2m-karras"
    assert create_scheduler("dpm++-2m", own).name == "dpm++-2m"
    for others in ({}, {"use_lu_lambdas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}):
        config = own | others | {"use_karras_sigmas": False, "_use_default_values": ["use_karras_sigmas"]}
        ours = create_scheduler("dpm++-2m-karras", config)
        assert_same_config(ours, DPMSolverMultistepScheduler.from_config(own, use_karras_sigmas=True))
        assert ours.name == "dpm++-2m-karras"


@pytest.mark.parametrize("name", CLASSES)
def test_a_spacing_of_null_is_off(name: str) -> None:
    """diffusers' `bool | None`."""
    config = SD15 | {"use_karras_sigmas": None, "use_exponential_sigmas": None, "use_beta_sigmas": None}
    assert create_scheduler(name, config).config == create_scheduler(name, SD15).config  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler-ancestral", "lcm", "ddpm"])
def test_spacings_of_the_scheduler_a_file_is_of_mean_nothing_to_others(name: str) -> None:
    """As in diffusers: `DDIMScheduler.from_config` of a scheduler with karras sigmas has none."""
    config = SD15 | {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}
    assert_same_config(create_scheduler(name, config), CLASSES[name].from_config(config))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown scheduler 'heun', expected one of ddim, pndm, euler, "):
        create_scheduler("heun", SD15)


@pytest.mark.parametrize("class_name", ["HeunDiscreteScheduler", None, []])
def test_a_file_of_another_scheduler_asks_for_a_choice(class_name: Any) -> None:
    with pytest.raises(BundleError, match=r"_class_name is .*choose one with --scheduler ddim or pndm or euler"):
        create_scheduler(None, SD15 | {"_class_name": class_name})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid', expected one of linear, "),
        ({"timestep_spacing": "log"}, "timestep_spacing is 'log', expected one of leading, "),
        ({"prediction_type": "flow"}, "prediction_type is 'flow', expected one of epsilon, "),
        ({"use_beta_sigmas": True}, "use_beta_sigmas is True, expected false"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas is True, expected false"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting is True, expected false"),
        ({"shift": 3.0}, "unknown key 'shift'"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps is '1000', expected a value of type int"),
        ({"num_train_timesteps": True}, "num_train_timesteps is True, expected a value of type int"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0, expected 1 or more"),
        ({"steps_offset": -1}, "steps_offset is -1, expected 0 or more"),
        ({"beta_end": float("nan")}, "beta_end is nan, expected a number between 0 and 1"),
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


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ddim", {"set_alpha_to_one": 1}, "set_alpha_to_one is 1, expected a value of type bool"),
        ("ddim", {"use_karras_sigmas": True}, "use_karras_sigmas is True, expected false"),
        ("pndm", {"use_lu_lambdas": True}, "use_lu_lambdas is True, expected false"),
        ("pndm", {"prediction_type": "sample"}, "prediction_type is 'sample', expected one of epsilon, v_prediction"),
        ("euler", {"interpolation_type": "cubic"}, "interpolation_type is 'cubic', expected one of linear, log_linear"),
        ("euler", {"timestep_type": "edm"}, "timestep_type is 'edm', expected one of discrete, continuous"),
        ("euler", {"final_sigmas_type": "one"}, "final_sigmas_type is 'one', expected one of zero, sigma_min"),
        ("euler", {"sigma_max": 0.0}, "sigma_max is 0.0, expected null or a number above 0"),
        ("euler", {"sigma_min": "small"}, "sigma_min is 'small', expected null or a number"),
        (
            "euler",
            {"use_karras_sigmas": True, "use_exponential_sigmas": True},
            "use_exponential_sigmas and use_karras_sigmas are both true, expected one of them",
        ),
        ("euler-ancestral", {"prediction_type": "sample"}, "prediction_type is 'sample', expected one of epsilon, "),
        ("dpm++-2m", {"algorithm_type": "sde-dpmsolver++"}, "is 'sde-dpmsolver++', expected one of dpmsolver++"),
        ("dpm++-2m", {"algorithm_type": "dpmsolver"}, "algorithm_type is 'dpmsolver', expected one of dpmsolver++"),
        ("dpm++-2m", {"solver_type": "rk"}, "solver_type is 'rk', expected one of midpoint, heun"),
        ("dpm++-2m", {"solver_order": 4}, "solver_order is 4, expected a whole number from 1 to 3"),
        ("dpm++-2m", {"variance_type": "learned_range"}, "variance_type is 'learned_range', expected null"),
        ("dpm++-2m", {"variance_type": 1}, "variance_type is 1, expected null or a name"),
        ("unipc", {"solver_type": "rk"}, "solver_type is 'rk', expected one of bh1, bh2"),
        ("unipc", {"solver_order": 0}, "solver_order is 0, expected a whole number from 1 to 9"),
        ("unipc", {"solver_p": {"a": 1}}, "solver_p is {'a': 1}, expected null: it is not supported"),
        ("unipc", {"disable_corrector": [0.5]}, "disable_corrector is [0.5], expected a list of whole numbers"),
        ("unipc", {"lower_order_final": False}, "lower_order_final is False, expected true: the last step leads to no"),
        ("lcm", {"original_inference_steps": 1001}, "original_inference_steps is 1001, expected a whole number from 1"),
        ("ddpm", {"variance_type": "learned"}, "variance_type is 'learned', expected one of fixed_small, "),
        ("ddpm", {"variance_type": "fixed_large_log"}, "variance_type is 'fixed_large_log', expected one of fixed_sma"),
    ],
    ids=str,
)
def test_what_one_scheduler_cannot_do_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError) as error:
        create_scheduler(name, SD15 | change)
    assert str(error.value).startswith("scheduler_config.json: ")
    assert message in str(error.value)


def test_a_quantile_out_of_range_is_refused() -> None:
    with pytest.raises(BundleError, match=r"dynamic_thresholding_ratio is 99.5, expected a number from 0 to 1"):
        create_scheduler("ddim", {"dynamic_thresholding_ratio": 99.5})


def test_noise_prediction_from_pure_noise_is_refused() -> None:
    """It divides by zero; with leading spacing the run begins before that timestep."""
    config = SD15 | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(BundleError, match="timestep 999 is pure noise"):
        create_scheduler("ddim", config).schedule(10)
    for name in ("ddpm", "lcm"):
        with pytest.raises(BundleError, match="timestep 999 is pure noise"):
            create_scheduler(name, config).schedule(10)
    assert create_scheduler("ddim", config | {"timestep_spacing": "leading"}).schedule(10).timesteps[0] == 901
    with pytest.raises(BundleError, match="timestep 9 is pure noise"):
        create_scheduler(
            "pndm", {"num_train_timesteps": 10, "trained_betas": [0.1] * 9 + [1.0], "timestep_spacing": "trailing"}
        ).schedule(5)


@pytest.mark.parametrize(("name", "steps"), list(product(CLASSES, [0, -1, 1001])))
def test_bad_step_counts_are_refused(name: str, steps: int) -> None:
    most = {"dpm++-2m": 999, "unipc": 999, "lcm": 50}.get(name, 1000)
    with pytest.raises(RequestError, match=f"--steps is {steps}, expected a whole number from 1 to {most}"):
        create_scheduler(name, SD15).schedule(steps)


@pytest.mark.parametrize(("name", "start"), list(product(CLASSES, [-1, 5, 6])))
def test_a_beginning_past_the_end_is_refused(name: str, start: int) -> None:
    with pytest.raises(RequestError, match=f"a run of 5 steps can begin at step 0 to 4, not at {start}"):
        create_scheduler(name, SD15).schedule(5, start=start)


def test_runge_kutta_cannot_begin_in_the_middle() -> None:
    with pytest.raises(RequestError, match=r"Runge-Kutta steps, which cannot begin in the middle .*--scheduler ddim"):
        create_scheduler("pndm", SD15 | {"skip_prk_steps": False}).schedule(6, start=1)


@pytest.mark.parametrize("name", ["dpm++-2m", "unipc"])
def test_solvers_refuse_levels_that_do_not_fall(name: str) -> None:
    """A second training timestep with the same alpha: `h` would be 0, and diffusers' latents NaN."""
    config = {"trained_betas": [0.1, 1e-9, 1e-9, 0.1], "num_train_timesteps": 4, "timestep_spacing": "trailing"}
    with pytest.raises(RequestError, match="--steps is 4, too many: the noise would not fall at each"):
        create_scheduler(name, config).schedule(4)


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


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "ddim"])
def test_eta_is_ddims_alone(name: str) -> None:
    with pytest.raises(RequestError, match=r"--eta is 0.5, but .* has no such option: leave it out, or use --sch"):
        create_scheduler(name, SD15).schedule(5, eta=0.5)


@pytest.mark.parametrize(
    ("name", "eta", "has_noise"),
    [
        ("ddim", 0.0, True),
        ("ddim", 1.0, False),
        *((name, 0.0, name not in WITH_NOISE) for name in CLASSES if name != "ddim"),
    ],
)
def test_noise_where_none_belongs_is_a_mistake_of_the_caller(name: str, eta: float, has_noise: bool) -> None:
    schedule, ones = create_scheduler(name, SD15).schedule(5, eta=eta), np.ones(SHAPE, np.float32)
    with pytest.raises(ValueError, match="noise"):
        schedule.step(0, ones, ones, schedule.start(), ones if has_noise else None)
