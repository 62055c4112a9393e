"""TensorRT-RTX's execution context. What it compiles when a plan first runs is kept for the next process."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from ipa.engines.signed_file import SignedFile


class RtxContext:
    """It captures CUDA graphs and compiles kernels by itself."""

    def __init__(self, library: Any, native: Any, kernels: SignedFile | None) -> None:
        """Make the context.

        Args:
            library: the module `tensorrt_rtx`.
            native: its engine.
            kernels: where those of earlier runs are; `None`: nowhere.
        """
        config = native.create_runtime_config()
        config.cuda_graph_strategy = library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._file, self._stored = kernels, None if kernels is None else kernels.read()
        self._cache = config.create_runtime_cache()
        if self._stored is not None:
            self._cache.deserialize(self._stored)  # false: of another driver or GPU; they are compiled again
        config.set_runtime_cache(self._cache)
        self.context = native.create_execution_context(config)

    def keep_kernels(self) -> None:
        """Write down what was compiled. A full disk or a failed GPU costs the next start its time, and no more."""
        with suppress(OSError, RuntimeError, TypeError):
            made = bytes(self._cache.serialize())
            if self._file is not None and made != self._stored:
                self._file.write(made)
