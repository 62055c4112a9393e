"""diffusers' schedulers, and the configurations that ours are compared with them on.

The oracle runs diffusers' scheduler in float64, with its float32 table of alphas widened to float64 like ours: then
both do the same arithmetic and agree to 1e-13 of the largest latent. Unwidened, diffusers computes its coefficients in
float32 (6e-8 each), which shows as up to 1e-6.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from ipa.runtime.schedulers import Schedule, create_scheduler

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
