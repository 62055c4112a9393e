"""The embedded default back-end: onnxruntime on the CPU."""

from __future__ import annotations

import os
import time

import onnxruntime as ort

from ipa.engines.closing import Closing
from ipa.engines.engine import Array, GraphFile, check_finite, check_inputs, check_names
from ipa.engines.errors import EngineError, first_line
from ipa.engines.machine import available_cores

_SEVERITY_ERROR = 3


class OnnxRuntimeEngine(Closing):
    """One graph in an onnxruntime CPU session; where a graph is float16, onnxruntime computes in float32."""

    precision = "float32"

    def __init__(self, graph: GraphFile) -> None:
        """Open the graph, always by its path: onnxruntime refuses external data when given bytes.

        Raises:
            EngineError: onnxruntime cannot load the graph, or its tensors are not the spec's.
        """
        self.component, self.spec = graph.component, graph.spec
        start = time.perf_counter()
        options = ort.SessionOptions()
        options.intra_op_num_threads = available_cores()
        options.log_severity_level = _SEVERITY_ERROR
        try:
            self._session: ort.InferenceSession | None = ort.InferenceSession(
                os.fspath(graph.path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise EngineError(f"{self.component}: onnxruntime cannot load {graph.path}: {first_line(error)}") from error
        check_names(graph, [tensor.name for tensor in self._session.get_inputs()])
        self._outputs = [tensor.name for tensor in self.spec.outputs]
        self.load_seconds = time.perf_counter() - start

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        """Outputs by name; see `Engine`."""
        if self._session is None:
            raise EngineError(f"{self.component}: the engine is closed")
        check_inputs(self.component, self.spec, inputs)
        try:
            arrays = self._session.run(self._outputs, inputs)
        except Exception as error:
            raise EngineError(f"{self.component}: onnxruntime failed: {first_line(error)}") from error
        outputs = dict(zip(self._outputs, arrays, strict=True))
        check_finite(self.component, outputs)
        return outputs

    def close(self) -> None:
        """Free the session."""
        self._session = None
