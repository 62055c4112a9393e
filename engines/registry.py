"""Which back-ends exist, and which one `auto` means on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from ipa.engines.engine import Engine
from ipa.engines.errors import EngineError, first_line
from ipa.engines.spec import ComponentSpec

Opener = Callable[[str, ComponentSpec, Path], Engine]


@dataclass(frozen=True)
class Backend:
    """A way to run graphs.

    Attributes:
        name: as `--engine` takes it.
        module: Python module that it needs.
        extra: of our distribution, which installs that module.
        summary: what it is, for people.
        open: opens a component's graph.
    """

    name: str
    module: str
    extra: str
    summary: str
    open: Opener

    @property
    def is_installed(self) -> bool:
        """Whether its module is there."""
        return find_spec(self.module) is not None

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install 'ipa-runtime[{self.extra}]'"


def _open_openvino(component: str, spec: ComponentSpec, path: Path) -> Engine:
    from ipa.engines.openvino_engine import OpenVinoEngine

    return OpenVinoEngine(component, spec, path)


def _open_onnxruntime(component: str, spec: ComponentSpec, path: Path) -> Engine:
    from ipa.engines.onnxruntime_engine import OnnxRuntimeEngine

    return OnnxRuntimeEngine(component, spec, path)


BACKENDS = (  # the fastest first: `auto` takes the first that is installed
    Backend("openvino", "openvino", "openvino", "any CPU, bfloat16 where it has it", _open_openvino),
    Backend("onnxruntime", "onnxruntime", "onnxruntime", "any CPU, float32", _open_onnxruntime),
)
ENGINE_NAMES = ("auto", *(backend.name for backend in BACKENDS))


@dataclass(frozen=True)
class Choice:
    """A back-end, and why it is the one: `as asked`, or what `auto` found."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def is_installed(name: str) -> bool:
    """Whether there is such a back-end, and its module."""
    return any(backend.name == name and backend.is_installed for backend in BACKENDS)


def resolve_engine(name: str) -> Choice:
    """The back-end that a name stands for: `auto` is the fastest one that this machine can run.

    Raises:
        EngineError: the back-end is unknown or not installed.
    """
    if name not in ENGINE_NAMES:
        raise EngineError(f"unknown engine '{name}', expected one of {', '.join(ENGINE_NAMES)}")
    if name == "auto":
        return _automatic()
    backend = _backend(name)
    if not backend.is_installed:
        raise EngineError(f"the engine '{name}' is not installed: run `{backend.install}`")
    return Choice(name, "as asked")


def _automatic() -> Choice:
    best = next((backend for backend in BACKENDS if backend.is_installed), None)
    if best is None:
        raise EngineError(f"no engine is installed: run `{BACKENDS[-1].install}`")
    faster = [backend for backend in BACKENDS[: BACKENDS.index(best)] if backend.extra != best.extra]
    hint = f"; faster: `{faster[-1].install}`" if faster else ""
    return Choice(best.name, f"the fastest that is installed: {best.summary}{hint}")


def _backend(name: str) -> Backend:
    return next(backend for backend in BACKENDS if backend.name == name)


def open_engine(name: str, component: str, spec: ComponentSpec, path: Path) -> Engine:
    """Open one component's graph in a back-end, one of `ENGINE_NAMES`.

    Raises:
        EngineError: the back-end is unknown or not installed, or it cannot load the graph.
    """
    backend = _backend(resolve_engine(name).name)
    try:
        import_module(backend.module)
    except Exception as error:  # a broken installation may raise anything
        raise EngineError(
            f"the engine '{backend.name}' cannot be loaded: {first_line(error)}; run `{backend.install}`, or name "
            "another with --engine"
        ) from error
    return backend.open(component, spec, path)
