"""The first CUDA device, by NVIDIA's own Python bindings: memory, copies, kernels, one stream, captured graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from cuda.bindings import driver

from ipa.engines.closing import Closing
from ipa.engines.engine import Array
from ipa.engines.errors import EngineError

_FIRST = 0
_MIB = 2**20


class CudaDevice(Closing):
    """Device memory by address, and one stream that all copies and launches go to, in order.

    Calls come from one thread at a time; `enter` makes the device that thread's.
    """

    def __init__(self) -> None:
        """Take the device.

        Raises:
            EngineError: the driver is missing or refuses.
        """
        self._buffers: set[int] = set()
        self._graphs: list[Any] = []
        self._modules: dict[bytes, Any] = {}
        self._stream: Any = None
        try:
            _done(driver.cuInit(0))
        except RuntimeError as error:  # the bindings found no driver library
            raise EngineError(f"CUDA: {error}; `ipa-doctor` says what is missing") from error
        self._device: Any = _value(driver.cuDeviceGet(_FIRST))
        self._context: Any = _value(driver.cuDevicePrimaryCtxRetain(self._device))
        try:
            self.enter()
            self._stream = _value(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        except EngineError:
            driver.cuDevicePrimaryCtxRelease(self._device)
            raise

    def enter(self) -> None:
        """Make the device the calling thread's."""
        _done(driver.cuCtxSetCurrent(self._context))

    @property
    def stream(self) -> int:
        """The stream's handle, for libraries that launch into it."""
        return int(self._stream)

    def allocate(self, size: int) -> int:
        """Address of new memory.

        Raises:
            EngineError: there is not enough; says how much there is.
        """
        error, pointer = driver.cuMemAlloc(size)
        if error == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            free, total = _values(driver.cuMemGetInfo())
            raise EngineError(
                f"GPU memory is full: {size / _MIB:.0f} MiB wanted, {free / _MIB:.0f} of {total / _MIB:.0f} MiB are "
                "free; end other programs on the GPU, or ask for a smaller picture or fewer at once"
            )
        self._buffers.add(int(_value((error, pointer))))
        return int(pointer)

    def free(self, pointer: int) -> None:
        """Give memory back."""
        self._buffers.remove(pointer)
        _done(driver.cuMemFree(pointer))

    def upload(self, pointer: int, array: Array) -> None:
        """Start copying a contiguous array to the device; keep it as it is until `synchronize`."""
        _done(driver.cuMemcpyHtoDAsync(pointer, array.ctypes.data, array.nbytes, self._stream))

    def download(self, array: Array, pointer: int) -> None:
        """Start copying from the device into a contiguous array, which is valid after `synchronize`."""
        _done(driver.cuMemcpyDtoHAsync(array.ctypes.data, pointer, array.nbytes, self._stream))

    def synchronize(self) -> None:
        """Wait for everything in the stream; what failed in it is raised here."""
        _done(driver.cuStreamSynchronize(self._stream))

    def capture(self, work: Callable[[], None]) -> Any:
        """Record what `work` puts into the stream as one graph; nothing of it runs.

        Raises:
            EngineError: something in it cannot be captured. The stream can be used as before.
        """
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _done(driver.cuStreamBeginCapture(self._stream, mode))
        try:
            work()
        finally:
            ended = driver.cuStreamEndCapture(self._stream)  # in any case, or the stream would stay in this mode
            if sys.exc_info()[0] is not None and ended[0] == driver.CUresult.CUDA_SUCCESS:
                driver.cuGraphDestroy(ended[1])
        graph = _value(ended)
        try:
            executable = _value(driver.cuGraphInstantiate(graph, 0))
        finally:
            driver.cuGraphDestroy(graph)
        self._graphs.append(executable)
        return executable

    def launch(self, graph: Any) -> None:
        """Run a captured graph."""
        _done(driver.cuGraphLaunch(graph, self._stream))

    def forget(self, graph: Any) -> None:
        """Free a captured graph."""
        self._graphs.remove(graph)
        _done(driver.cuGraphExecDestroy(graph))

    def kernels(self, ptx: bytes, names: Sequence[str]) -> list[Any]:
        """Functions of a PTX text, which the driver compiles the first time.

        Raises:
            EngineError: the driver is too old for it, or does not know a name.
        """
        if ptx not in self._modules:
            self._modules[ptx] = _value(driver.cuModuleLoadData(ptx + b"\0"))
        return [_value(driver.cuModuleGetFunction(self._modules[ptx], name.encode())) for name in names]

    def launch_kernel(
        self, function: Any, blocks: int, threads: int, values: tuple[Any, ...], types: tuple[Any, ...]
    ) -> None:
        """Put a kernel into the stream.

        Args:
            blocks, threads: in one dimension.
            values, types: of its parameters; the types are ctypes'.
        """
        size = (blocks, 1, 1, threads, 1, 1)
        _done(driver.cuLaunchKernel(function, *size, 0, self._stream, (values, types), 0))

    def close(self) -> None:
        """Free everything that was made here; calling it twice is fine.

        Never raises: after a failure on the device every call fails, and the first message is the one that counts.
        """
        if self._stream is None:
            return
        driver.cuCtxSetCurrent(self._context)
        for graph in self._graphs:
            driver.cuGraphExecDestroy(graph)
        for module in self._modules.values():
            driver.cuModuleUnload(module)
        for pointer in self._buffers:
            driver.cuMemFree(pointer)
        driver.cuStreamDestroy(self._stream)
        driver.cuDevicePrimaryCtxRelease(self._device)
        self._graphs, self._modules, self._buffers, self._stream = [], {}, set(), None


def _values(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call gave behind its error code.

    Raises:
        EngineError: the code is not success.
    """
    code, *values = result
    if code != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(code)
        raise EngineError(f"CUDA failed: {text.decode() if text else code.name} ({code.name})")
    return tuple(values)


def _value(result: tuple[Any, ...]) -> Any:
    (value,) = _values(result)
    return value


def _done(result: tuple[Any, ...]) -> None:
    _values(result)
