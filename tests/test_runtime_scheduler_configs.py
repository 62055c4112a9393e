"""Scheduler configurations: read as diffusers reads them, refused where they make no sense."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers import DDIMScheduler, PNDMScheduler
from scheduler_oracle import CLASSES, SD15, SHAPE

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
