"""The schedulers that the runtime has, by the class that a `scheduler_config.json` of diffusers names."""

from __future__ import annotations

from collections.abc import Mapping

SCHEDULER_CLASSES: Mapping[str, str] = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "DPMSolverMultistepScheduler": "dpm++-2m",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
    "DDPMScheduler": "ddpm",
}
