"""TensorRT and TensorRT-RTX: a plan from the cache, device buffers made once, one CUDA graph for the shapes in use."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from ipa.engines.cuda_device import CudaDevice
from ipa.engines.cuda_driver import NoDriver, find_driver
from ipa.engines.engine import Array, GraphFile, check_finite, check_inputs
from ipa.engines.errors import EngineError
from ipa.engines.plan_choice import StoredPlan, usable_plans
from ipa.engines.plan_file import PlanError
from ipa.engines.shape_profile import Shape, covers
from ipa.engines.tensorrt_library import library_version, load_library

_RUNS_BEFORE_CAPTURE = 1  # libraries may set themselves up in the first run, which a graph must not hold


@dataclass
class _Buffer:
    """Device memory of one tensor, and the unchanging array that was copied there last, if it was one."""

    pointer: int
    size: int
    constant: Array | None = None


class TensorRtEngine:
    """One component's plan in an execution context.

    Inputs that are marked read-only are copied to the device once. From the second call with the same shapes on, the
    whole execution is one CUDA graph.
    """

    def __init__(self, graph: GraphFile, engine: str, make_device: Callable[[], CudaDevice] = CudaDevice) -> None:
        """Find a plan for this machine and make it ready.

        Args:
            graph: the component.
            engine: `tensorrt` or `tensorrt-rtx`.
            make_device: opens the GPU.
        Raises:
            EngineError: there is no GPU, no plan for it, not enough memory, or the library refuses the plan.
        """
        start = time.perf_counter()
        self.component, self.spec, self._engine = graph.component, graph.spec, engine
        self._bundle = graph.bundle
        self._library = load_library(engine)
        driver = find_driver()
        if isinstance(driver, NoDriver):
            raise EngineError(f"the engine '{engine}' cannot run here: {driver.reason}")
        self._plans = usable_plans(graph, engine, library_version(engine), driver.gpus[0])
        self._messages: list[str] = []
        self._logger = _logger(self._library, self._messages)
        self._runtime = self._library.Runtime(self._logger)
        self._device: CudaDevice | None = make_device()
        self._buffers: dict[str, _Buffer] = {}
        self._native: Any = None  # the library's engine
        self._context: Any = None
        self._graph: Any = None
        self._shapes: dict[str, Shape] = {}
        try:
            self._load(self._plans[0])
        except BaseException:
            self.close()
            raise
        self.load_seconds = time.perf_counter() - start

    def _load(self, plan: StoredPlan) -> None:
        """Take a plan into use, in place of the one before."""
        self._forget_graph()
        self._shapes = {}
        self._context = self._native = None
        try:
            content = plan.load()
        except (PlanError, OSError) as error:
            raise EngineError(f"{self.component}: the plan is refused: {error}; {self._build_hint()}") from error
        self._native = self._runtime.deserialize_cuda_engine(content)
        if self._native is None:
            raise self._failed("does not accept the plan")
        self._context = self._native.create_execution_context()
        if self._context is None:
            raise self._failed("cannot make an execution context, most likely for want of GPU memory")
        self._header = plan.header
        self.precision = plan.header.key.precision

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        """Outputs by name; see `Engine`."""
        device = self._device
        if device is None:
            raise EngineError(f"{self.component}: the engine is closed")
        check_inputs(self.component, self.spec, inputs)
        shapes = {name: array.shape for name, array in inputs.items()}
        if shapes != self._shapes:
            start = time.perf_counter()
            self._prepare(device, shapes)
            self.load_seconds += time.perf_counter() - start
        for name, array in inputs.items():
            self._upload(device, self._buffers[name], array)
        self._execute(device)
        outputs = {tensor.name: np.empty(self._output_shape(tensor.name), tensor.dtype) for tensor in self.spec.outputs}
        for name, array in outputs.items():
            device.download(array, self._buffers[name].pointer)
        device.synchronize()
        check_finite(self.component, outputs)
        return outputs

    def _prepare(self, device: CudaDevice, shapes: dict[str, Shape]) -> None:
        """Buffers and addresses for these input shapes, with another plan if this one's profile is too narrow."""
        self._forget_graph()
        self._shapes = {}  # until everything below has succeeded
        if not covers(self._header.key.profile, shapes):
            self._load(self._plan_for(shapes))
        for tensor in self.spec.inputs:
            if any(isinstance(axis, str) for axis in tensor.axes) and not self._context.set_input_shape(
                tensor.name, shapes[tensor.name]
            ):
                raise self._failed(f"refuses the shape {shapes[tensor.name]} of {tensor.name}")
            self._bind(device, tensor.name, shapes[tensor.name], tensor.dtype)
        if missing := self._context.infer_shapes():
            raise self._failed(f"cannot tell the shapes of {missing}")
        for tensor in self.spec.outputs:
            self._bind(device, tensor.name, self._output_shape(tensor.name), tensor.dtype)
        self._runs = 0
        self._shapes = shapes

    def accepts(self, shapes: dict[str, Shape]) -> bool:
        """Whether there is a plan for inputs of these shapes."""
        return any(covers(plan.header.key.profile, shapes) for plan in self._plans)

    def _plan_for(self, shapes: dict[str, Shape]) -> StoredPlan:
        for plan in self._plans:
            if covers(plan.header.key.profile, shapes):
                return plan
        wanted = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items() if shape)
        raise EngineError(
            f"{self.component}: no engine was built for {wanted}; built for {self._header.key.profile}. "
            f"{self._build_hint()} with other --resolution, --batch or --image-tokens"
        )

    def _bind(self, device: CudaDevice, name: str, shape: Shape, dtype: str) -> None:
        size = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size:
            if buffer is not None:
                device.free(self._buffers.pop(name).pointer)
            buffer = self._buffers[name] = _Buffer(device.allocate(size), size)
        buffer.constant = None
        if not self._context.set_tensor_address(name, buffer.pointer):
            raise self._failed(f"refuses the address of {name}")

    def _output_shape(self, name: str) -> Shape:
        return tuple(self._context.get_tensor_shape(name))

    def _upload(self, device: CudaDevice, buffer: _Buffer, array: Array) -> None:
        if buffer.constant is array:
            return
        buffer.constant = None if array.flags.writeable else array
        device.upload(buffer.pointer, np.asarray(array, order="C"))

    def _execute(self, device: CudaDevice) -> None:
        if self._graph is None and self._runs == _RUNS_BEFORE_CAPTURE:
            try:
                self._graph = device.capture(self._enqueue)
            except EngineError:  # not everything can be captured; it runs all the same
                self._graph = None
        if self._graph is None:
            self._enqueue()
        else:
            device.launch(self._graph)
        self._runs += 1

    def _enqueue(self) -> None:
        assert self._device is not None
        if not self._context.execute_async_v3(self._device.stream):
            raise self._failed("failed")

    def _forget_graph(self) -> None:
        if self._graph is not None and self._device is not None:
            self._device.forget(self._graph)
        self._graph = None

    def _build_hint(self) -> str:
        return f"Run `ipa-export build-engines --bundle {self._bundle} --engine {self._engine}`"

    def _failed(self, what: str) -> EngineError:
        """An error with what the library has said last."""
        said = f": {self._messages[-1]}" if self._messages else ""
        return EngineError(f"{self.component}: {self._engine} {self._library.__version__} {what}{said}")

    def close(self) -> None:
        """Free plan and device memory; calling it twice is fine."""
        if self._device is not None:
            self._forget_graph()
            self._context = self._native = None  # before the memory that they point to
            self._device.close()
        self._device = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _logger(trt: Any, messages: list[str]) -> Any:
    """Keeps what the library reports as an error, for our own messages."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                messages.append(message)

    return Logger()
