"""onnxruntime on an NVIDIA GPU: inputs and outputs stay in device memory, fixed shapes run as one CUDA graph."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnxruntime as ort

from ipa.engines.engine import Array, GraphFile, check_finite, check_inputs, check_names
from ipa.engines.errors import EngineError, first_line
from ipa.engines.machine import available_cores
from ipa.engines.shape_profile import Shape
from ipa.engines.spec import Axis

_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
_SEVERITY_FATAL = 4  # errors come as exceptions
_FIRST = 0


class OnnxRuntimeCudaEngine:
    """One graph in a session of onnxruntime's CUDA provider.

    Inputs that are marked read-only are copied to the device once. Where the spec tells the shapes of all outputs (the
    UNet), the buffers are made once for each set of shapes, and onnxruntime replays the step as a CUDA graph if it can.
    """

    def __init__(self, graph: GraphFile, device: str = "cuda") -> None:
        """Open the graph.

        Args:
            graph: the component.
            device: `cuda`; `cpu` takes the same way through onnxruntime without a GPU.
        Raises:
            EngineError: onnxruntime cannot load the graph, or falls back to the CPU.
        """
        start = time.perf_counter()
        self.component, self.spec, self._path = graph.component, graph.spec, os.fspath(graph.path)
        self._device = device
        self._has_known_outputs = _outputs_are_known(graph)
        self._is_captured = self._has_known_outputs and device == "cuda"
        self.precision = graph.spec.outputs[0].dtype
        if device == "cuda" and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA libraries that pip has installed
        self._session: ort.InferenceSession | None = self._open()
        check_names(graph, [tensor.name for tensor in self._session.get_inputs()])
        self._shapes: dict[str, Shape] = {}
        self._inputs: dict[str, ort.OrtValue] = {}
        self._outputs: dict[str, ort.OrtValue] = {}
        self._constants: dict[str, Array] = {}
        self.load_seconds = time.perf_counter() - start

    def _open(self) -> ort.InferenceSession:
        """A session; without a CUDA graph where onnxruntime cannot make one of this graph."""
        provider = _PROVIDERS[self._device]
        options = ort.SessionOptions()
        options.intra_op_num_threads = available_cores()
        options.log_severity_level = _SEVERITY_FATAL
        cuda = {"device_id": str(_FIRST), "enable_cuda_graph": "1" if self._is_captured else "0"}
        providers: list[Any] = [(provider, cuda) if self._device == "cuda" else provider]
        try:
            session = ort.InferenceSession(self._path, options, providers=providers)
        except Exception as error:
            if self._is_captured:
                self._is_captured = False
                return self._open()
            raise EngineError(f"{self.component}: onnxruntime cannot load {self._path}: {first_line(error)}") from error
        if session.get_providers()[0] != provider:
            raise EngineError(
                f"{self.component}: onnxruntime has no working {provider}; "
                "`ipa-doctor` says what is missing, or use another --engine"
            )
        return session

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        """Outputs by name; see `Engine`."""
        if self._session is None:
            raise EngineError(f"{self.component}: the engine is closed")
        check_inputs(self.component, self.spec, inputs)
        try:
            outputs = self._run(self._session, inputs)
        except Exception as error:
            raise EngineError(f"{self.component}: onnxruntime failed: {first_line(error)}") from error
        check_finite(self.component, outputs)
        return outputs

    def _run(self, session: ort.InferenceSession, inputs: dict[str, Array]) -> dict[str, Array]:
        shapes = {name: array.shape for name, array in inputs.items()}
        if shapes != self._shapes:
            if self._shapes and self._is_captured:  # a session replays the graph of its first shapes
                start = time.perf_counter()
                session = self._session = self._open()
                self.load_seconds += time.perf_counter() - start
            self._prepare(inputs)
            self._shapes = shapes
        binding = session.io_binding()
        for name, array in inputs.items():
            if self._constants.get(name) is not array:
                self._inputs[name].update_inplace(np.asarray(array, order="C"))
                self._constants.pop(name, None)
                if not array.flags.writeable:
                    self._constants[name] = array
            binding.bind_ortvalue_input(name, self._inputs[name])
        for tensor in self.spec.outputs:
            if tensor.name in self._outputs:
                binding.bind_ortvalue_output(tensor.name, self._outputs[tensor.name])
            else:
                binding.bind_output(tensor.name, self._device, _FIRST)
        binding.synchronize_inputs()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        arrays = binding.copy_outputs_to_cpu()
        # Buffers of ours are written again by the next call.
        return {tensor.name: np.array(array) for tensor, array in zip(self.spec.outputs, arrays, strict=True)}

    def _prepare(self, inputs: dict[str, Array]) -> None:
        """Device memory for inputs and outputs of these shapes."""
        self._constants = {}
        self._inputs = {name: self._allocate(array.shape, array.dtype) for name, array in inputs.items()}
        self._outputs = {}
        if self._has_known_outputs:
            sizes: dict[Axis, int] = {}
            for tensor in self.spec.inputs:
                sizes |= zip(tensor.axes, inputs[tensor.name].shape, strict=True)
            for tensor in self.spec.outputs:
                shape = tuple(axis if isinstance(axis, int) else sizes[axis] for axis in tensor.axes)
                self._outputs[tensor.name] = self._allocate(shape, np.dtype(tensor.dtype))

    def _allocate(self, shape: Shape, dtype: np.dtype[Any]) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self._device, _FIRST)

    def close(self) -> None:
        """Free the session and the buffers."""
        self._session = None
        self._inputs, self._outputs, self._constants, self._shapes = {}, {}, {}, {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _outputs_are_known(graph: GraphFile) -> bool:
    """Whether every free axis of the outputs is one of the inputs'."""
    given = {axis for tensor in graph.spec.inputs for axis in tensor.axes}
    return all(axis in given for tensor in graph.spec.outputs for axis in tensor.axes if isinstance(axis, str))
