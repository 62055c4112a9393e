"""diffusers' schedulers, and the configurations that ours are compared with them on.

The oracle runs diffusers' scheduler in float64, with its float32 tables widened to float64 like ours: then both do the
same arithmetic and agree to 1e-13 of the largest latent. Unwidened, diffusers computes its coefficients in float32
(6e-8 each), which shows as up to 1e-6.

Two things stand in the way, and are changed here and nowhere else:
- torch.sqrt (MKL's) is off by one unit in the last place for one value in six, so the two tables of sigmas differ by
  1.2e-7. They are compared, and then both sides run on ours.
- Euler's and DPM-Solver's `step` begin with `sample.to(torch.float32)`: in their modules, `torch.float32` is made to
  mean float64 while they step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from ipa.runtime.schedulers import Schedule, create_scheduler

ORACLE_TOLERANCE = 1e-13  # 5e-16 seen
SOLVER_TOLERANCE = 1e-12  # a solver of order p divides differences by the p-th power of a step in lambda: 8e-14 seen
FLOAT32_COEFFICIENTS_TOLERANCE = 1e-6
FLOAT32_TOLERANCE = 5e-6  # two float32 computations in different order, over a whole run: 1e-6 seen
SIGMAS_TOLERANCE = 4e-7  # relative: torch.sqrt's last place, and what interpolation makes of two of them
SHAPE = (2, 4, 6, 5)
CLASSES: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-ancestral": EulerAncestralDiscreteScheduler,
    "dpm++-2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "lcm": LCMScheduler,
    "ddpm": DDPMScheduler,
}
WITH_NOISE = ("euler-ancestral", "lcm", "ddpm")
MULTISTEP = ("dpm++-2m", "unipc")

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
LEVELS: dict[str, dict[str, Any]] = {
    "timesteps": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
}


def model(latents: np.ndarray, timestep: float, index: int) -> np.ndarray:
    """A stand-in for the UNet: depends on latents and timestep, and on the call so that history matters."""
    random = np.random.default_rng(index).standard_normal(latents.shape).astype(latents.dtype)
    return np.tanh(latents[:, ::-1]) * latents.dtype.type(1 - timestep / 2000) + random


def from_config(name: str, config: dict[str, Any], steps: int, start: int = 0) -> Any:
    """diffusers' scheduler as it comes, its timesteps set, and begun where an image-to-image pipeline begins it.

    Also at 0: where the first timestep comes twice, a scheduler that looks for its place finds the second and runs past
    the end of its table (IndexError).
    Source: `StableDiffusionImg2ImgPipeline.get_timesteps`.
    """
    theirs = CLASSES[name].from_config(config)
    theirs.set_timesteps(steps)
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(start * theirs.order)
    return theirs


def widened(theirs: Any, whole: Any) -> Any:
    """diffusers' scheduler with its tables in float64; sigmas, and the timesteps that they decide, are our own.

    Args:
        theirs: the scheduler, its timesteps set.
        whole: our run with all its steps.
    """
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    if hasattr(theirs, "final_alpha_cumprod"):
        theirs.final_alpha_cumprod = theirs.final_alpha_cumprod.double()
    if hasattr(whole, "sigmas"):
        # With `log_linear` interpolation diffusers' table is one longer than any step reads.
        np.testing.assert_allclose(whole.sigmas, theirs.sigmas.numpy()[: len(whole.sigmas)], rtol=SIGMAS_TOLERANCE)
        np.testing.assert_allclose(whole.timesteps, theirs.timesteps.numpy(), rtol=0, atol=timesteps_tolerance(theirs))
        assert theirs.timesteps.numpy().dtype == whole.timesteps.dtype
        theirs.sigmas = torch.tensor(whole.sigmas, dtype=torch.float64)
        theirs.timesteps = torch.from_numpy(whole.timesteps.copy())
    return theirs


def timesteps_tolerance(theirs: Any) -> float:
    """How far the timesteps may differ, for tables of sigmas that differ in the last place.

    Cut off to whole numbers (exponential sigmas in the solvers) the ends of the table fall to either side.
    """
    if theirs.timesteps.dtype == torch.float32:
        return 2e-3
    is_cut = theirs.config.use_exponential_sigmas or theirs.config.beta_schedule == "squaredcos_cap_v2"
    return 1 if is_cut else 0


class _Float64Torch:
    """The module torch, where float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def stepping(theirs: Any, noise: np.ndarray | None, dtype: Any) -> Iterator[mock.Mock]:
    """While diffusers steps: its noise is `noise`, its arithmetic in `dtype`. Gives what counts its draws."""
    module = sys.modules[type(theirs).__module__]
    drawn = mock.Mock(return_value=None if noise is None else torch.from_numpy(noise))
    with ExitStack() as stack:
        if hasattr(module, "randn_tensor"):
            stack.enter_context(mock.patch.object(module, "randn_tensor", drawn))
        if dtype == np.float64:
            stack.enter_context(mock.patch.object(module, "torch", _Float64Torch()))
        yield drawn


def assert_same_run(
    schedule: Schedule, theirs: Any, tolerance: float, dtype: Any = np.float64, start: int = 0, **step_options: Any
) -> None:
    """Both from the same latents to the end, each on its own, compared after every step.

    Relative to the largest latent of the step, or to 1 where the run ends in nothing.
    """
    timesteps = theirs.timesteps[start:]
    assert schedule.timesteps.dtype == timesteps.numpy().dtype
    np.testing.assert_allclose(schedule.timesteps, timesteps.numpy(), rtol=0, atol=tolerance_in_float32(theirs, dtype))
    np.testing.assert_allclose(schedule.init_noise_sigma, float(theirs.init_noise_sigma), rtol=SIGMAS_TOLERANCE)
    random = np.random.default_rng(0)
    latents = (random.standard_normal(SHAPE) * schedule.init_noise_sigma).astype(dtype)
    expected, state = torch.from_numpy(latents), schedule.start()
    for index, timestep in enumerate(timesteps):
        noise = random.standard_normal(SHAPE).astype(dtype) if schedule.needs_noise(index) else None
        sample = schedule.scale_model_input(index, latents)
        assert sample.dtype == dtype
        noise_pred = model(sample, float(timestep), index)
        latents, state = schedule.step(index, noise_pred, latents, state, noise)
        with stepping(theirs, noise, dtype) as drawn:
            theirs_sample = theirs.scale_model_input(expected, timestep)
            theirs_pred = torch.from_numpy(model(theirs_sample.numpy(), float(timestep), index))
            # LCM computes in float32 with timesteps that are tensors.
            at = timestep.item() if timesteps.dtype == torch.int64 else timestep
            expected = theirs.step(theirs_pred, at, expected, **step_options).prev_sample
        assert drawn.call_count == (noise is not None), f"step {index} draws noise {drawn.call_count} times"
        assert latents.dtype == dtype
        difference = np.abs(latents - expected.numpy()).max() / np.abs(expected.numpy()).max()
        assert difference <= tolerance, f"step {index}, timestep {timestep}: {difference}"


def tolerance_in_float32(theirs: Any, dtype: Any) -> float:
    """Timesteps are equal on widened tables, and where no sigmas decide them."""
    return timesteps_tolerance(theirs) if dtype == np.float32 and hasattr(theirs, "sigmas") else 0


def pair(name: str, config: dict[str, Any], steps: int, eta: float = 0.0, start: int = 0) -> tuple[Schedule, Any]:
    """Our schedule and diffusers' scheduler for the same configuration, the latter in float64."""
    ours = create_scheduler(name, config)
    theirs = widened(from_config(name, config, steps, start), ours.schedule(steps, eta=eta))
    return ours.schedule(steps, eta=eta, start=start), theirs
