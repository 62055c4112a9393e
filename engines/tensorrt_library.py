"""TensorRT under either of its names: `tensorrt` (10.13 and later, 11) or `tensorrt_rtx`, which have one interface."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

from ipa.engines.errors import EngineError, first_line

# Back-end name to module and to the extra of our distribution that installs it.
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
EXTRAS = {"tensorrt": "trt-cu13", "tensorrt-rtx": "trt-rtx"}
_OLDEST = {"tensorrt": (10, 13), "tensorrt-rtx": (1, 4)}


def is_installed(engine: str) -> bool:
    """Whether the module of a back-end is there."""
    return find_spec(MODULES[engine]) is not None


def load_library(engine: str) -> Any:
    """Import the module of a back-end.

    Args:
        engine: `tensorrt` or `tensorrt-rtx`.
    Raises:
        EngineError: it is missing, cannot be loaded, or is too old.
    """
    install = f"pip install 'ipa-runtime[{EXTRAS[engine]}]'"
    if not is_installed(engine):
        raise EngineError(f"the engine '{engine}' is not installed: run `{install}`")
    try:
        library = importlib.import_module(MODULES[engine])
    except (ImportError, OSError) as error:  # its shared libraries are of another CUDA major, or missing
        raise EngineError(f"the engine '{engine}' cannot be loaded: {first_line(error)}; run `{install}`") from error
    version = tuple(int(part) for part in library.__version__.split(".")[:2])
    if version < _OLDEST[engine]:
        oldest = ".".join(map(str, _OLDEST[engine]))
        raise EngineError(f"{engine} {library.__version__} is too old, {oldest} is needed: run `{install}`")
    return library
