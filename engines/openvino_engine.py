"""OpenVINO on the CPU: bfloat16 where the processor has it, compiled for the shapes that a request brings."""

from __future__ import annotations

import os
import time
from functools import cache

import openvino as ov

from ipa.engines.closing import Closing
from ipa.engines.engine import Array, GraphFile, check_finite, check_inputs, check_names
from ipa.engines.errors import EngineError, first_line
from ipa.engines.machine import available_cores

_DEVICE = "CPU"
# Where bfloat16 pays: nearly all of the time is spent here. The rest keeps float32, it costs next to nothing.
_HALF_COMPONENTS = frozenset({"unet", "vae_decoder", "vae_encoder"})
_HINTS = {"bfloat16": "bf16", "float32": "f32"}
_Shapes = tuple[tuple[int, ...], ...]


@cache
def _core() -> ov.Core:
    """The process's only core. Its CPU plug-in replaces the signal stack and puts the old one back when it goes: two
    of them that go in the order they came leave a freed one, and the next signal (Ctrl-C) kills the process.
    """
    return ov.Core()


def has_bfloat16() -> bool:
    """Whether this processor computes in bfloat16."""
    return "BF16" in _core().get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES")


class OpenVinoEngine(Closing):
    """One graph, compiled for one set of input shapes at a time.

    A fixed shape makes a step faster than free axes do; a change of shape compiles again (11 s for SD1.5's UNet on two
    cores) and gives back the memory of the one before.
    """

    def __init__(self, graph: GraphFile) -> None:
        """Read the graph; it is compiled when the first shapes are known.

        Raises:
            EngineError: OpenVINO cannot read the graph, or its tensors are not the spec's.
        """
        self.component, self.spec, self._path = graph.component, graph.spec, graph.path
        start = time.perf_counter()
        self._model: ov.Model | None = self._read()
        check_names(graph, [tensor.get_any_name() for tensor in self._model.inputs])
        is_half = self.component in _HALF_COMPONENTS and has_bfloat16()
        self.precision = "bfloat16" if is_half else "float32"
        self._shapes: _Shapes | None = None
        self._request: ov.InferRequest | None = None
        self._is_closed = False
        self.load_seconds = time.perf_counter() - start

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        """Outputs by name; see `Engine`."""
        if self._is_closed:
            raise EngineError(f"{self.component}: the engine is closed")
        check_inputs(self.component, self.spec, inputs)
        try:
            request = self._compiled({name: array.shape for name, array in inputs.items()})
            request.infer(inputs, share_inputs=True)
            outputs = {tensor.name: request.get_tensor(tensor.name).data.copy() for tensor in self.spec.outputs}
        except Exception as error:
            raise EngineError(f"{self.component}: OpenVINO failed: {first_line(error)}") from error
        check_finite(self.component, outputs)
        return outputs

    def _read(self) -> ov.Model:
        try:
            return _core().read_model(os.fspath(self._path))
        except Exception as error:
            raise EngineError(f"{self.component}: OpenVINO cannot load {self._path}: {first_line(error)}") from error

    def _compiled(self, shapes: dict[str, tuple[int, ...]]) -> ov.InferRequest:
        """An inference request for these shapes."""
        wanted = tuple(shapes[tensor.name] for tensor in self.spec.inputs)
        if self._request is None or wanted != self._shapes:
            start = time.perf_counter()
            self._request = None
            # The graph's weights are not needed once they are compiled, and are read again for other shapes.
            model, self._model = self._model or self._read(), None
            model.reshape({name: list(shape) for name, shape in shapes.items()})
            options = {
                "INFERENCE_PRECISION_HINT": _HINTS[self.precision],
                "INFERENCE_NUM_THREADS": available_cores(),
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
            }
            self._request = _core().compile_model(model, _DEVICE, options).create_infer_request()
            self._shapes = wanted
            self.load_seconds += time.perf_counter() - start
        return self._request

    def close(self) -> None:
        """Free the graph and what was compiled from it."""
        self._request = self._model = None
        self._is_closed = True
