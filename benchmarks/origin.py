"""Which machine, libraries and command a record's figures come from."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ipa.benchmarks.records import Origin
from ipa.engines.cuda_driver import NoDriver, find_driver
from ipa.engines.machine import available_cores

LIBRARIES = ("ipa-runtime", "numpy", "torch", "diffusers", "transformers", "onnxruntime", "openvino", "torchmetrics")


def origin(libraries: Iterable[str] = LIBRARIES) -> Origin:
    """This process: its command line, the machine, and the versions of those libraries that are installed."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    found = {name: text for name in libraries if (text := _version(name))}
    return Origin(command, datetime.now(UTC).isoformat(timespec="seconds"), machine(), found)


def machine() -> dict[str, Any]:
    """The machine in words and numbers: `system`, `cpu`, `cores` we may use, `memory_gib`, `gpu`."""
    driver = find_driver()
    gpus = [] if isinstance(driver, NoDriver) else [gpu.name for gpu in driver.gpus]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cpu": _cpu(),
        "cores": available_cores(),
        "memory_gib": round(memory / 2**30, 1),
        "gpu": ", ".join(gpus),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    named = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = named.get("flags", "").split()
    extra = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{named.get('model name', 'unknown')} ({', '.join(extra)})" if extra else named.get("model name", "unknown")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
