"""Noise schedulers in numpy, configured by diffusers' own `scheduler_config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ipa.engines.errors import BundleError, RequestError
from ipa.engines.scheduler_names import SCHEDULER_CLASSES
from ipa.runtime.schedulers.names import SCHEDULER_NAMES, SCHEDULERS
from ipa.runtime.schedulers.schedule import Schedule, Scheduler, State

__all__ = ["SCHEDULER_NAMES", "Schedule", "Scheduler", "State", "create_scheduler"]

_KARRAS = {
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": True,
    "use_lu_lambdas": False,
}


def _karras(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration with karras sigmas, whatever it says of them."""
    defaulted = [key for key in config.get("_use_default_values", ()) if key not in _KARRAS]
    return {**config, **_KARRAS, "_use_default_values": defaulted}


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
    if name not in SCHEDULERS:
        raise RequestError(f"unknown scheduler '{name}', expected one of {', '.join(SCHEDULER_NAMES)}")
    module, scheduler, configuration = SCHEDULERS[name]
    home = import_module(f"ipa.runtime.schedulers.{module}")
    if name == "dpm++-2m-karras":
        config = _karras(config)
    made: Scheduler = getattr(home, scheduler)(getattr(home, configuration).from_dict(config))
    return made
