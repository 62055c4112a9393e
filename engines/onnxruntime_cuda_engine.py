"""onnxruntime on an NVIDIA GPU: inputs and outputs stay in device memory, fixed shapes run as one CUDA graph."""

from __future__ import annotations

import os
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort

from ipa.engines.closing import Closing
from ipa.engines.engine import Array, GraphFile, check_finite, check_inputs, check_names
from ipa.engines.errors import EngineError, first_line
from ipa.engines.machine import available_cores
from ipa.engines.shape_profile import Shape
from ipa.engines.spec import axis_size

_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
_SEVERITY_FATAL = 4  # errors come as exceptions
_FIRST = 0
_MOST_SHAPES = 4  # sets of buffers kept: a run alternates between two at most, where an image prompt comes or goes
# An ONNX file: y = Identity(x), float32, one number.
_PROBE = bytes.fromhex(
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a08080112040a0208"
    "0142040a001012"
)


@dataclass(frozen=True)
class _Buffers:
    """Device memory for one set of input shapes, and the CUDA graph that reads and writes it, by number.

    Attributes:
        inputs, outputs: by name; outputs whose shape the spec does not tell have none.
        constants: the unchanging arrays that lie in `inputs`.
    """

    graph: int
    inputs: dict[str, ort.OrtValue]
    outputs: dict[str, ort.OrtValue]
    constants: dict[str, Array]


@cache
def cuda_problem() -> str:
    """Why onnxruntime cannot compute on a GPU here; empty where it can. Tried once, on a graph of one node."""
    if _PROVIDERS["cuda"] not in ort.get_available_providers():
        return "this onnxruntime was built without CUDA; two distributions of onnxruntime overwrite each other's files"
    try:
        _session(_PROBE, "cuda", False)
    except Exception as error:
        return first_line(error)
    return ""


def _session(model: str | bytes, device: str, captures: bool) -> ort.InferenceSession:
    """A session that never falls back to another provider, and prints nothing to stdout."""
    provider = _PROVIDERS[device]
    options = ort.SessionOptions()
    options.intra_op_num_threads = available_cores()
    options.log_severity_level = _SEVERITY_FATAL
    cuda = {
        "device_id": str(_FIRST),
        "enable_cuda_graph": "1" if captures else "0",
        "use_tf32": "0",  # on by default: float32 would have 10 bits in place of 23
    }
    providers: list[Any] = [(provider, cuda) if device == "cuda" else provider]
    with redirect_stdout(sys.stderr):
        if device == "cuda":
            ort.preload_dlls()  # CUDA libraries that pip has installed
        session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    if session.get_providers()[0] != provider:
        raise EngineError(f"onnxruntime has no working {provider}")
    return session


class OnnxRuntimeCudaEngine(Closing):
    """One graph in a session of onnxruntime's CUDA provider.

    Inputs that are marked read-only are copied to the device once. Where the spec tells the shapes of all outputs, the
    buffers are made once for each set of shapes in use, and onnxruntime replays a call as a CUDA graph if it can.
    """

    def __init__(self, graph: GraphFile, device: str = "cuda") -> None:
        """Open the graph.

        Args:
            graph: the component.
            device: `cuda`; `cpu` takes the same way through onnxruntime without a GPU.
        Raises:
            EngineError: onnxruntime cannot load the graph, or not on this device.
        """
        start = time.perf_counter()
        self.component, self.spec = graph.component, graph.spec
        self.precision = graph.spec.outputs[0].dtype
        self._device = device
        self._has_known_outputs = _outputs_are_known(graph)
        self.is_captured = self._has_known_outputs and device == "cuda"
        self._session: ort.InferenceSession | None = self._open(os.fspath(graph.path))
        check_names(graph, [tensor.name for tensor in self._session.get_inputs()])
        self._buffers: dict[tuple[Shape, ...], _Buffers] = {}
        self._graphs = 0
        self.load_seconds = time.perf_counter() - start

    def _open(self, path: str) -> ort.InferenceSession:
        """A session; without a CUDA graph where onnxruntime cannot make one of this graph."""
        try:
            return _session(path, self._device, self.is_captured)
        except Exception as error:
            if self.is_captured:
                self.is_captured = False
                return self._open(path)
            raise EngineError(f"{self.component}: onnxruntime cannot load {path}: {first_line(error)}") from error

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
        shapes = tuple(inputs[tensor.name].shape for tensor in self.spec.inputs)
        buffers = self._buffers.pop(shapes, None) or self._allocate(inputs)
        self._buffers[shapes] = buffers  # the newest last
        if len(self._buffers) > _MOST_SHAPES:
            del self._buffers[next(iter(self._buffers))]
        binding = session.io_binding()
        for name, array in inputs.items():
            if buffers.constants.get(name) is not array:
                buffers.constants.pop(name, None)
                buffers.inputs[name].update_inplace(np.asarray(array, order="C"))
                if not array.flags.writeable:
                    buffers.constants[name] = array
            binding.bind_ortvalue_input(name, buffers.inputs[name])
        for tensor in self.spec.outputs:
            if tensor.name in buffers.outputs:
                binding.bind_ortvalue_output(tensor.name, buffers.outputs[tensor.name])
            else:
                binding.bind_output(tensor.name, self._device, _FIRST)
        options = ort.RunOptions()
        if self.is_captured:
            options.add_run_config_entry("gpu_graph_id", str(buffers.graph))
        binding.synchronize_inputs()
        session.run_with_iobinding(binding, options)
        binding.synchronize_outputs()
        # On the host the arrays share memory with buffers that the next call writes.
        return {
            tensor.name: np.array(array)
            for tensor, array in zip(self.spec.outputs, binding.copy_outputs_to_cpu(), strict=True)
        }

    def _allocate(self, inputs: dict[str, Array]) -> _Buffers:
        """Device memory for inputs and outputs of these shapes."""
        outputs = {}
        if self._has_known_outputs:
            sizes: dict[str, int] = {}
            for tensor in self.spec.inputs:
                sizes |= zip(map(str, tensor.axes), inputs[tensor.name].shape, strict=True)
            for tensor in self.spec.outputs:
                shape = tuple(axis_size(axis, sizes) for axis in tensor.axes)
                outputs[tensor.name] = self._tensor(shape, np.dtype(tensor.dtype))
        tensors = {name: self._tensor(array.shape, array.dtype) for name, array in inputs.items()}
        self._graphs += 1  # a number is never used again: onnxruntime keeps its graph, which reads freed memory
        return _Buffers(self._graphs, tensors, outputs, {})

    def _tensor(self, shape: Shape, dtype: np.dtype[Any]) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self._device, _FIRST)

    def close(self) -> None:
        """Free the session and the buffers."""
        self._session, self._buffers = None, {}


def _outputs_are_known(graph: GraphFile) -> bool:
    """Whether every free axis of the outputs is one of the inputs', or follows from them."""
    given = {str(axis): 1 for tensor in graph.spec.inputs for axis in tensor.axes}
    try:
        return all(axis_size(axis, given) for tensor in graph.spec.outputs for axis in tensor.axes)
    except KeyError:
        return False
