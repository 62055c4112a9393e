"""Which back-ends exist, and which one `auto` means on this machine."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from ipa.engines.engine import Engine
from ipa.engines.errors import EngineError
from ipa.engines.spec import ComponentSpec

Opener = Callable[[str, ComponentSpec, Path], Engine]


def _open_onnxruntime(component: str, spec: ComponentSpec, path: Path) -> Engine:
    from ipa.engines.onnxruntime_engine import OnnxRuntimeEngine

    return OnnxRuntimeEngine(component, spec, path)


_OPENERS: dict[str, Opener] = {"onnxruntime": _open_onnxruntime}
ENGINE_NAMES = ("auto", *_OPENERS)


def resolve_engine(name: str) -> str:
    """The back-end that a name stands for: `auto` is the fastest one that this machine can run.

    Raises:
        EngineError: the back-end is unknown or not installed.
    """
    if name not in ENGINE_NAMES:
        raise EngineError(f"unknown engine '{name}', expected one of {', '.join(ENGINE_NAMES)}")
    if find_spec("onnxruntime") is None:
        raise EngineError("the engine 'onnxruntime' is not installed: run `pip install 'ipa-runtime[onnxruntime]'`")
    return "onnxruntime" if name == "auto" else name


def open_engine(name: str, component: str, spec: ComponentSpec, path: Path) -> Engine:
    """Open one component's graph in a back-end, one of `ENGINE_NAMES`.

    Raises:
        EngineError: the back-end is unknown or not installed, or it cannot load the graph.
    """
    return _OPENERS[resolve_engine(name)](component, spec, path)
