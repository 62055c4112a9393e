"""What TensorRT-RTX compiles when a plan first runs, kept beside the plan. It is native code: signed, as plans are.

A file is: magic, HMAC over the plan's key and the kernels, kernels. One that does not fit is left alone: it is compiled
again, and then replaced.
"""

from __future__ import annotations

import hmac
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

_MAGIC = b"IPAKERN1"
_MAC_BYTES = 32


class KernelFile:
    """The kernels of one plan."""

    def __init__(self, path: Path, secret: bytes, key_digest: str) -> None:
        """Name it.

        Args:
            path: of the file, which need not exist.
            secret: of the plan cache it lies in.
            key_digest: of the plan.
        """
        self.path = path
        self._secret, self._key = secret, key_digest.encode()

    def read(self) -> bytes | None:
        """The kernels; `None` if there are none, or if this cache did not write them for this plan."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return None
        start = len(_MAGIC) + _MAC_BYTES
        kernels = content[start:]
        fits = hmac.compare_digest(content[:start], _MAGIC + self._mac(kernels))
        return kernels if fits else None

    def write(self, kernels: bytes) -> None:
        """Replace what was there, whole or not at all.

        Raises:
            OSError: the disk is full or failed.
        """
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".", suffix=".partial")  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + self._mac(kernels) + kernels)
            Path(name).replace(self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _mac(self, kernels: bytes) -> bytes:
        return hmac.digest(self._secret, _MAGIC + self._key + kernels, "sha256")


class RtxContext:
    """TensorRT-RTX's execution context: it captures CUDA graphs and compiles kernels by itself."""

    def __init__(self, library: Any, native: Any, kernels: KernelFile | None) -> None:
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
