"""The schedulers by name, and where each is: only the one in use is imported."""

from __future__ import annotations

# Name -> module, class, its configuration. A configuration names diffusers' class, which `CLASSES` knows.
SCHEDULERS = {
    "ddim": ("ddim", "DDIMScheduler", "DDIMConfig"),
    "pndm": ("pndm", "PNDMScheduler", "PNDMConfig"),
    "euler": ("euler", "EulerScheduler", "EulerConfig"),
    "euler-ancestral": ("euler_ancestral", "EulerAncestralScheduler", "EulerAncestralConfig"),
    "dpm++-2m": ("dpmsolver", "DPMSolverScheduler", "DPMSolverConfig"),
    "dpm++-2m-karras": ("dpmsolver", "DPMSolverScheduler", "DPMSolverConfig"),
    "unipc": ("unipc", "UniPCScheduler", "UniPCConfig"),
    "lcm": ("lcm", "LCMScheduler", "LCMConfig"),
    "ddpm": ("ddpm", "DDPMScheduler", "DDPMConfig"),
}
SCHEDULER_NAMES = tuple(SCHEDULERS)
CLASSES = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "DPMSolverMultistepScheduler": "dpm++-2m",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
    "DDPMScheduler": "ddpm",
}
