"""Noise schedulers in numpy, configured by diffusers' own `scheduler_config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ipa.engines.errors import BundleError, RequestError
from ipa.runtime.schedulers.config import DDIMConfig, PNDMConfig
from ipa.runtime.schedulers.ddim import DDIMScheduler
from ipa.runtime.schedulers.pndm import PNDMScheduler
from ipa.runtime.schedulers.schedule import Schedule, Scheduler, State

__all__ = ["SCHEDULER_NAMES", "Schedule", "Scheduler", "State", "create_scheduler"]

SCHEDULER_NAMES = ("ddim", "pndm")
_NAMES_BY_CLASS = {"DDIMScheduler": "ddim", "PNDMScheduler": "pndm"}


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
        if class_name not in _NAMES_BY_CLASS:
            raise BundleError(
                f"scheduler_config.json: _class_name is {class_name!r}, expected one of "
                f"{', '.join(_NAMES_BY_CLASS)}; choose one with --scheduler {' or '.join(SCHEDULER_NAMES)}"
            )
        name = _NAMES_BY_CLASS[class_name]
    match name:
        case "ddim":
            return DDIMScheduler(DDIMConfig.from_dict(config))
        case "pndm":
            return PNDMScheduler(PNDMConfig.from_dict(config))
        case _:
            raise RequestError(f"unknown scheduler '{name}', expected one of {', '.join(SCHEDULER_NAMES)}")
