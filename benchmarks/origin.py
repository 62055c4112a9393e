"""Which machine, libraries and command a record's figures come from."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ipa.benchmarks.records import Origin
from ipa.engines.cuda_driver import NoDriver, find_driver
from ipa.engines.errors import EngineError
from ipa.engines.machine import available_cores
from ipa.engines.tensorrt_library import MODULES, is_installed, library_version

LIBRARIES = (
    *("ipa-runtime", "numpy", "torch", "diffusers", "transformers"),
    *("onnxruntime", "onnxruntime-gpu", "openvino", "torchmetrics"),
)
_DRIVER = Path("/proc/driver/nvidia/version")


def origin(libraries: Iterable[str] = LIBRARIES) -> Origin:
    """This process: its command line, the machine, and the versions of those libraries that are installed.

    TensorRT's libraries and NVIDIA's driver are among the versions wherever they are found.
    """
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    found = {name: text for name in libraries if (text := _version(name))}
    return Origin(command, datetime.now(UTC).isoformat(timespec="seconds"), machine(), found | _nvidia_versions())


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


def _nvidia_versions() -> dict[str, str]:
    """Of `tensorrt` and `tensorrt_rtx`, of the driver, and the newest CUDA that it serves."""
    found = dict[str, str]()
    for engine, module in MODULES.items():
        if is_installed(engine):
            try:
                found[module] = library_version(engine)
            except EngineError:  # it cannot be loaded: it has computed nothing
                continue
    driver = find_driver()
    if not isinstance(driver, NoDriver):
        found["CUDA of the driver"] = ".".join(map(str, driver.cuda))
        if match := re.search(r"Kernel Module\b.*?\s(\d+(?:\.\d+)+)", _text(_DRIVER)):
            found["NVIDIA driver"] = match[1]
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except OSError:
        return ""


def _cpu() -> str:
    lines = _text(Path("/proc/cpuinfo")).splitlines()
    if not lines:
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
