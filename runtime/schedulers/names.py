"""The schedulers by name, and where each is: only the one in use is imported."""

from __future__ import annotations

# Name -> module, class, its configuration.
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
