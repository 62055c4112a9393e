"""Which back-ends exist, and which one `auto` means on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from ipa.engines import tensorrt_library
from ipa.engines.cuda_driver import NoDriver, find_driver
from ipa.engines.engine import Engine, GraphFile
from ipa.engines.errors import EngineError, first_line
from ipa.engines.machine import distribution_version, has_distribution

Opener = Callable[[GraphFile], Engine]
Obstacle = Callable[[Sequence[GraphFile]], str]
# Distributions of onnxruntime, which all bring the same module.
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")


@dataclass(frozen=True)
class Backend:
    """A way to run graphs.

    Attributes:
        name: as `--engine` takes it.
        modules: Python modules that it needs.
        summary: what it is, for people.
        install: the command that installs it here.
        open: opens a component's graph.
        needs_gpu: whether it is of no use without an NVIDIA GPU.
        obstacle: why it cannot run these graphs although it is installed; empty where it can.
        doubt: why `auto` leaves it alone although nothing is in its way; empty where it does not.
        distribution: that must be installed, where the modules do not tell.
    """

    name: str
    modules: tuple[str, ...]
    summary: str
    install: Callable[[], str]
    open: Opener
    needs_gpu: bool = False
    obstacle: Obstacle = lambda graphs: ""
    doubt: Callable[[], str] = lambda: ""
    distribution: str = ""

    @property
    def is_installed(self) -> bool:
        """Whether everything that it needs is there."""
        return all(map(_is_there, self.modules)) and (not self.distribution or has_distribution(self.distribution))

    @property
    def version(self) -> str:
        """Of the library that computes; `unknown` where no distribution says."""
        if self.name in tensorrt_library.MODULES:
            return tensorrt_library.library_version(self.name)
        rivals = ONNXRUNTIMES if self.modules[0] == "onnxruntime" else ()
        found = map(distribution_version, (self.distribution or self.modules[0], *rivals))
        return next(filter(None, found), "unknown")


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False


def _extra(name: str) -> Callable[[], str]:
    return lambda: f"pip install 'ipa-runtime[{name}]'"


def _open_openvino(graph: GraphFile) -> Engine:
    from ipa.engines.openvino_engine import OpenVinoEngine

    return OpenVinoEngine(graph)


def _open_onnxruntime(graph: GraphFile) -> Engine:
    from ipa.engines.onnxruntime_engine import OnnxRuntimeEngine

    return OnnxRuntimeEngine(graph)


def _open_onnxruntime_cuda(graph: GraphFile) -> Engine:
    from ipa.engines.onnxruntime_cuda_engine import OnnxRuntimeCudaEngine

    return OnnxRuntimeCudaEngine(graph)


def _tensorrt(name: str, summary: str) -> Backend:
    def open_plan(graph: GraphFile) -> Engine:
        from ipa.engines.tensorrt_engine import TensorRtEngine

        return TensorRtEngine(graph, name)

    def doubt() -> str:
        driver = find_driver()
        try:
            if isinstance(driver, NoDriver) or tensorrt_library.supports(name, driver.gpus[0].capability):
                return ""
        except EngineError as error:
            return str(error)
        return f"it does not list compute capability {driver.gpus[0].capability}"

    def obstacle(graphs: Sequence[GraphFile]) -> str:
        driver = find_driver()
        if isinstance(driver, NoDriver):
            return driver.reason
        if not graphs:
            return "its engines are built for each bundle: `ipa-export build-engines`"
        try:
            from ipa.engines.plan_choice import usable_plans

            version = tensorrt_library.library_version(name)
            for graph in graphs:
                usable_plans(graph, name, version, driver.gpus[0])
        except (EngineError, ImportError) as error:  # the cache needs a Unix
            return str(error)
        return ""

    return Backend(
        name,
        (tensorrt_library.MODULES[name], "cuda.bindings"),
        summary,
        lambda: tensorrt_library.install_command(name),
        open_plan,
        needs_gpu=True,
        obstacle=obstacle,
        doubt=doubt,
    )


def _cuda_obstacle(graphs: Sequence[GraphFile]) -> str:
    driver = find_driver()
    if isinstance(driver, NoDriver):
        return driver.reason
    try:
        from ipa.engines.onnxruntime_cuda_engine import cuda_problem
    except ImportError as error:
        return first_line(error)
    return cuda_problem()


BACKENDS = (  # the fastest first: `auto` takes the first that can run
    _tensorrt("tensorrt", "NVIDIA GPUs; builds on the GPU that it will run on"),
    _tensorrt("tensorrt-rtx", "NVIDIA GPUs; builds without a GPU"),
    Backend(
        "onnxruntime-cuda",
        ("onnxruntime",),
        "NVIDIA GPUs, nothing to build",
        _extra("cuda"),
        _open_onnxruntime_cuda,
        needs_gpu=True,
        obstacle=_cuda_obstacle,
        distribution="onnxruntime-gpu",
    ),
    Backend("openvino", ("openvino",), "any CPU, bfloat16 where it has it", _extra("openvino"), _open_openvino),
    Backend("onnxruntime", ("onnxruntime",), "any CPU, float32", _extra("onnxruntime"), _open_onnxruntime),
)
ENGINE_NAMES = ("auto", *(backend.name for backend in BACKENDS))


@dataclass(frozen=True)
class Choice:
    """A back-end, and why it is the one: `as asked`, or what `auto` found."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def resolve_engine(name: str, graphs: Sequence[GraphFile] = ()) -> Choice:
    """The back-end that a name stands for: `auto` is the fastest one that this machine can run.

    Args:
        name: one of `ENGINE_NAMES`.
        graphs: what it is to run; engines that are built beforehand must be there for all of them.
    Raises:
        EngineError: the back-end is unknown, not installed or cannot run here.
    """
    if name not in ENGINE_NAMES:
        raise EngineError(f"unknown engine '{name}', expected one of {', '.join(ENGINE_NAMES)}")
    if name == "auto":
        return _automatic(graphs)
    backend = backend_named(name)
    if not backend.is_installed:
        raise EngineError(f"the engine '{name}' is not installed: run `{backend.install()}`")
    if reason := backend.obstacle(graphs):
        raise EngineError(f"the engine '{name}' cannot run here: {reason}; `--engine auto` takes one that can")
    return Choice(name, "as asked")


def _automatic(graphs: Sequence[GraphFile]) -> Choice:
    """The first that can run; of the faster ones, the reason says what would help."""
    reasons, installs = list[str](), list[str]()
    has_gpu = not isinstance(find_driver(), NoDriver)
    for backend in BACKENDS:
        if backend.needs_gpu and not has_gpu:
            continue
        if not backend.is_installed:
            installs.append(f"faster: `{backend.install()}`")
        elif reason := backend.doubt() or backend.obstacle(graphs):
            reasons.append(f"not {backend.name}: {reason}")
        else:
            return Choice(
                backend.name, "; ".join([f"the fastest that runs here: {backend.summary}", *[*reasons, *installs][:1]])
            )
    raise EngineError(f"no engine is installed: run `{BACKENDS[-1].install()}`")


def backend_named(name: str) -> Backend:
    """One of `BACKENDS`."""
    return next(backend for backend in BACKENDS if backend.name == name)


def open_engine(name: str, graph: GraphFile) -> Engine:
    """Open one component's graph in a back-end, one of `ENGINE_NAMES`.

    Raises:
        EngineError: the back-end is unknown or not installed, or it cannot load the graph.
    """
    backend = backend_named(resolve_engine(name, [graph]).name)
    for module in backend.modules:
        try:
            import_module(module)
        except Exception as error:  # a broken installation may raise anything
            raise EngineError(
                f"the engine '{backend.name}' cannot be loaded: {first_line(error)}; run `{backend.install()}`, or "
                "name another with --engine"
            ) from error
    return backend.open(graph)
