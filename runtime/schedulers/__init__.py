"""Noise schedulers in numpy, configured by diffusers' own `scheduler_config.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ipa.engines.errors import BundleError, RequestError
from ipa.engines.scheduler_names import SCHEDULER_CLASSES
from ipa.runtime.schedulers.ddim import DDIMConfig, DDIMScheduler
from ipa.runtime.schedulers.ddpm import DDPMConfig, DDPMScheduler
from ipa.runtime.schedulers.dpmsolver import DPMSolverConfig, DPMSolverScheduler
from ipa.runtime.schedulers.euler import EulerConfig, EulerScheduler
from ipa.runtime.schedulers.euler_ancestral import EulerAncestralConfig, EulerAncestralScheduler
from ipa.runtime.schedulers.lcm import LCMConfig, LCMScheduler
from ipa.runtime.schedulers.pndm import PNDMConfig, PNDMScheduler
from ipa.runtime.schedulers.schedule import Schedule, Scheduler, State
from ipa.runtime.schedulers.unipc import UniPCConfig, UniPCScheduler

__all__ = ["SCHEDULER_NAMES", "Schedule", "Scheduler", "State", "create_scheduler"]

_KARRAS = {
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": True,
    "use_lu_lambdas": False,
}


def _karras(config: Mapping[str, Any]) -> Scheduler:
    """DPM-Solver++ with karras sigmas, whatever the configuration says of them."""
    defaulted = [key for key in config.get("_use_default_values", ()) if key not in _KARRAS]
    return DPMSolverScheduler(DPMSolverConfig.from_dict({**config, **_KARRAS, "_use_default_values": defaulted}))


_SCHEDULERS: dict[str, Callable[[Mapping[str, Any]], Scheduler]] = {
    "ddim": lambda config: DDIMScheduler(DDIMConfig.from_dict(config)),
    "pndm": lambda config: PNDMScheduler(PNDMConfig.from_dict(config)),
    "euler": lambda config: EulerScheduler(EulerConfig.from_dict(config)),
    "euler-ancestral": lambda config: EulerAncestralScheduler(EulerAncestralConfig.from_dict(config)),
    "dpm++-2m": lambda config: DPMSolverScheduler(DPMSolverConfig.from_dict(config)),
    "dpm++-2m-karras": _karras,
    "unipc": lambda config: UniPCScheduler(UniPCConfig.from_dict(config)),
    "lcm": lambda config: LCMScheduler(LCMConfig.from_dict(config)),
    "ddpm": lambda config: DDPMScheduler(DDPMConfig.from_dict(config)),
}
SCHEDULER_NAMES = tuple(_SCHEDULERS)


def create_scheduler(name: str | None, config: Mapping[str, Any]) -> Scheduler:
    """The scheduler of that name, as diffusers' `from_config` makes it of a configuration of any scheduler.

    Args:
        name: one of `SCHEDULER_NAMES`; `None` is the one the configuration names.
        config: the contents of a `scheduler_config.json`. Keys it leaves out have the scheduler's own defaults.
    Raises:
        RequestError: the name is unknown.
        BundleError: the configuration names a scheduler that we do not have, or does not fit.
    """
    if name is None:
        class_name = config.get("_class_name")
        if not isinstance(class_name, str) or class_name not in SCHEDULER_CLASSES:
            raise BundleError(
                f"scheduler_config.json: _class_name is {class_name!r}, expected one of "
                f"{', '.join(SCHEDULER_CLASSES)}; choose one with --scheduler {' or '.join(SCHEDULER_NAMES)}"
            )
        name = SCHEDULER_CLASSES[class_name]
    if name not in _SCHEDULERS:
        raise RequestError(f"unknown scheduler '{name}', expected one of {', '.join(SCHEDULER_NAMES)}")
    return _SCHEDULERS[name](config)
