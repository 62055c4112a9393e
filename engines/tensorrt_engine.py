"""TensorRT and TensorRT-RTX: a plan from the cache, device buffers made once, one CUDA graph for the shapes in use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ipa.engines.closing import Closing
from ipa.engines.cuda_device import CudaDevice
from ipa.engines.cuda_driver import NoDriver, find_driver
from ipa.engines.device_latents import DeviceLatents
from ipa.engines.engine import Array, GraphFile, check_finite, check_inputs
from ipa.engines.errors import EngineError, first_line
from ipa.engines.linear_run import LinearRun
from ipa.engines.plan_choice import StoredPlan, usable_plans
from ipa.engines.plan_file import PlanError, PlanHeader
from ipa.engines.rtx_context import RtxContext
from ipa.engines.shape_profile import Shape, covers
from ipa.engines.tensorrt_library import library_version, load_library, logger

_RUNS_BEFORE_CAPTURE = 1  # libraries may set themselves up in the first run, which a graph must not hold


@dataclass
class _Buffer:
    """Device memory of one tensor, and the unchanging array that was copied there last, if it was one."""

    pointer: int
    size: int
    constant: Array | None = None


class TensorRtEngine(Closing):
    """One component's plan in an execution context.

    Inputs that are marked read-only are copied to the device once. From the second call with the same shapes on, the
    whole execution is one CUDA graph; TensorRT-RTX captures it by itself.
    """

    def __init__(self, graph: GraphFile, engine: str) -> None:
        """Find a plan for this machine and make it ready.

        Args:
            graph: the component.
            engine: `tensorrt` or `tensorrt-rtx`.
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
        self._log = logger(engine)
        self._device: CudaDevice | None = CudaDevice()
        self._buffers: dict[str, _Buffer] = {}
        self._native: Any = None  # the library's engine
        self._context: Any = None
        self._rtx: RtxContext | None = None
        self._graph: Any = None
        self._shapes: dict[str, Shape] = {}
        try:
            self._runtime = self._told("cannot start", lambda: self._library.Runtime(self._log))
            self._load(self._plans[0])
        except BaseException:
            self.close()
            raise
        self.load_seconds = time.perf_counter() - start

    def _load(self, plan: StoredPlan) -> None:
        """Take a plan into use, in place of the one before."""
        self._forget_graph()
        self._shapes = {}
        self._leave_context()  # the memory of the plan before, first
        self._header: PlanHeader | None = None
        try:
            content = plan.load()
        except (PlanError, OSError) as error:
            raise EngineError(f"{self.component}: the plan is refused: {error}; {self._build_hint()}") from error
        self._native = self._told("does not accept the plan", lambda: self._runtime.deserialize_cuda_engine(content))
        self._context = self._told(
            "cannot make an execution context; GPU memory may be full", lambda: self._new_context(plan)
        )
        self._header = plan.header
        self.precision = plan.header.key.precision

    def _new_context(self, plan: StoredPlan) -> Any:
        if not self._captures_itself:
            return self._native.create_execution_context()
        self._rtx = RtxContext(self._library, self._native, plan.kernels)
        return self._rtx.context

    def _leave_context(self) -> None:
        if self._rtx is not None:
            self._rtx.keep_kernels()
        self._rtx = self._context = self._native = None

    @property
    def is_captured(self) -> bool:
        """Whether the last call was one CUDA graph."""
        return self._graph is not None or self._captures_itself

    @property
    def _captures_itself(self) -> bool:
        return hasattr(self._library, "CudaGraphStrategy")

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        """Outputs by name; see `Engine`."""
        device = self._entered()
        self._fit(device, inputs)
        copied = [self._upload(device, self._buffers[name], array) for name, array in inputs.items()]
        self._execute(device)
        outputs = {tensor.name: np.empty(self._output_shape(tensor.name), tensor.dtype) for tensor in self.spec.outputs}
        for name, array in outputs.items():
            device.download(array, self._buffers[name].pointer)
        device.synchronize()
        del copied  # until here the device may read from them
        check_finite(self.component, outputs)
        return outputs

    def denoise(self, run: LinearRun, conditions: Callable[[int], Mapping[str, Array]]) -> Iterator[Array]:
        """Keep the latents on the GPU over the steps; see `DenoisingEngine`."""
        device, sample = self._entered(), self.spec.inputs[0]
        # For its shape alone: the kernel writes what is in it.
        shape = np.empty((run.halves * len(run.latents), *run.latents.shape[1:]), sample.dtype)
        latents = DeviceLatents(device, run, sample.dtype)
        try:
            for index, step in enumerate(run.steps):
                device.enter()
                given = {"timestep": np.asarray(step.timestep, np.float32), **conditions(index)}
                self._fit(device, {sample.name: shape, **given})
                copied = [self._upload(device, self._buffers[name], array) for name, array in given.items()]
                self._buffers[sample.name].constant = None
                latents.write_sample(index, self._buffers[sample.name].pointer)
                self._execute(device)
                after = latents.step(index, self._buffers[self.spec.outputs[0].name].pointer)
                del copied
                check_finite(self.component, {"latents": after})
                yield after
        finally:
            if self._device is not None:  # else it is free already
                latents.free()

    def _entered(self) -> CudaDevice:
        """The device, made the calling thread's."""
        if self._device is None:
            raise EngineError(f"{self.component}: the engine is closed")
        self._device.enter()
        return self._device

    def _fit(self, device: CudaDevice, inputs: Mapping[str, Array]) -> None:
        """Check inputs and get ready for their shapes."""
        check_inputs(self.component, self.spec, inputs)
        shapes = {name: array.shape for name, array in inputs.items()}
        if shapes != self._shapes:
            start = time.perf_counter()
            self._prepare(device, shapes)
            self.load_seconds += time.perf_counter() - start

    def _prepare(self, device: CudaDevice, shapes: dict[str, Shape]) -> None:
        """Buffers and addresses for these input shapes, with another plan if this one's profile is too narrow."""
        self._forget_graph()
        self._shapes = {}  # until everything below has succeeded
        if self._header is None or not covers(self._header.key.profile, shapes):
            self._load(self._plan_for(shapes))
        for tensor in self.spec.inputs:
            if any(isinstance(axis, str) for axis in tensor.axes) and not self._context.set_input_shape(
                tensor.name, shapes[tensor.name]
            ):
                raise self._failed(f"refuses the shape {shapes[tensor.name]} of {tensor.name}")
            self._bind(device, tensor.name, shapes[tensor.name], tensor.dtype)
        missing = self._told("cannot tell the shapes", lambda: (self._context.infer_shapes(),))
        if missing != ([],):
            raise self._failed(f"cannot tell the shapes of {missing[0]}")
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
            f"{self.component}: no engine was built for {wanted}; "
            f"the newest is for {self._plans[0].header.key.profile}. "
            f"{self._build_hint()} with other --resolution, --batch or --image-tokens, or name another --engine"
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

    def _upload(self, device: CudaDevice, buffer: _Buffer, array: Array) -> Array | None:
        """Start a copy where one is needed; what must be kept until it is done."""
        if buffer.constant is array:
            return None
        buffer.constant = None if array.flags.writeable else array
        contiguous = np.asarray(array, order="C")
        device.upload(buffer.pointer, contiguous)
        return contiguous

    def _execute(self, device: CudaDevice) -> None:
        if not self._captures_itself and self._graph is None and self._runs == _RUNS_BEFORE_CAPTURE:
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
        self._log.errors.clear()
        if not self._context.execute_async_v3(self._device.stream):
            raise self._failed("failed")

    def _forget_graph(self) -> None:
        if self._graph is not None and self._device is not None:
            self._device.forget(self._graph)
        self._graph = None

    def _build_hint(self) -> str:
        return f"Run `ipa-export build-engines --bundle {self._bundle} --engine {self._engine}`"

    def _told(self, what: str, work: Callable[[], Any]) -> Any:
        """Something that the library makes.

        Raises:
            EngineError: it made nothing, or raised.
        """
        self._log.errors.clear()
        try:
            made = work()
        except (RuntimeError, TypeError, MemoryError) as error:
            raise self._failed(what, first_line(error)) from error
        if made is None:
            raise self._failed(what)
        return made

    def _failed(self, what: str, reason: str = "") -> EngineError:
        """An error with what the library said first: what follows is about cleaning up."""
        said = next(iter(self._log.errors), reason)
        said = f": {said}" if said else ""
        return EngineError(f"{self.component}: {self._engine} {self._library.__version__} {what}{said}")

    def close(self) -> None:
        """Free plan and device memory; calling it twice is fine."""
        if self._device is not None:
            self._leave_context()  # before the memory that it points to
            self._device.close()
        self._device = None
