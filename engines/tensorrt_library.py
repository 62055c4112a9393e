"""TensorRT under either of its names: `tensorrt` (10.13 and later, 11) or `tensorrt_rtx`, which have one interface."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

from ipa.engines.cuda_driver import Driver, NoDriver, find_driver
from ipa.engines.errors import EngineError, first_line
from ipa.engines.machine import has_distribution

# Back-end name to module.
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_CUDA_MAJORS = ("cu13", "cu12")
_OLDEST = {"tensorrt": (10, 13), "tensorrt-rtx": (1, 4)}


def is_installed(engine: str) -> bool:
    """Whether the module of a back-end is there."""
    return find_spec(MODULES[engine]) is not None


def install_command(engine: str, driver: Driver | NoDriver | None = None) -> str:
    """The command that installs a back-end for this machine.

    Args:
        engine: `tensorrt` or `tensorrt-rtx`.
        driver: as `find_driver` gives it; left out: it is asked.
    """
    if engine == "tensorrt-rtx":
        return "pip install 'ipa-runtime[trt-rtx]'"
    driver = find_driver() if driver is None else driver
    major = "cu12" if isinstance(driver, Driver) and driver.cuda[0] < 13 else "cu13"
    return f"pip install 'ipa-runtime[trt-{major}]'"


def library_version(engine: str) -> str:
    """Version of a back-end that is installed, with the CUDA major it was made for: `11.4.0.106 cu13`."""
    library = load_library(engine)
    majors = [major for major in _CUDA_MAJORS if has_distribution(f"{MODULES[engine]}_{major}")]
    return " ".join([str(library.__version__), *majors[:1]])


def supports(engine: str, capability: str) -> bool:
    """Whether a library says that it knows a compute capability; TensorRT-RTX lists those that it builds for."""
    known = [name for name in dir(getattr(load_library(engine), "ComputeCapability", None)) if name.startswith("SM")]
    return engine != "tensorrt-rtx" or not known or f"SM{capability.replace('.', '')}" in known


def load_library(engine: str) -> Any:
    """Import the module of a back-end.

    Args:
        engine: `tensorrt` or `tensorrt-rtx`.
    Raises:
        EngineError: it is missing, cannot be loaded, or is too old.
    """
    install = install_command(engine)
    if not is_installed(engine):
        raise EngineError(f"the engine '{engine}' is not installed: run `{install}`")
    try:
        library = importlib.import_module(MODULES[engine])
    except (ImportError, OSError) as error:  # its shared libraries are of another CUDA major, or missing
        raise EngineError(f"the engine '{engine}' cannot be loaded: {first_line(error)}; run `{install}`") from error
    found = tuple(int(part) for part in library.__version__.split(".")[:2])
    if found < _OLDEST[engine]:
        oldest = ".".join(map(str, _OLDEST[engine]))
        raise EngineError(f"{engine} {library.__version__} is too old, {oldest} is needed: run `{install}`")
    return library


@cache
def logger(engine: str) -> Any:
    """The library's only logger: it keeps the first that it gets, whoever brings another. `errors` lists what it was
    told since that was cleared; with `prints` it goes to stderr, too.
    """
    trt: Any = load_library(engine)

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.prints = False

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
                if self.prints:
                    print(message, file=sys.stderr, flush=True)

    return Logger()
