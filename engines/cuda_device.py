"""The first CUDA device, by NVIDIA's own Python bindings: memory, copies, one stream, captured graphs."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from cuda.bindings import driver

from ipa.engines.engine import Array
from ipa.engines.errors import EngineError

_FIRST = 0
_MIB = 2**20


class CudaDevice:
    """Device memory by address, and one stream that all copies and launches go to, in order.

    The device's primary context is current in the thread that made this; use it from that thread.
    """

    def __init__(self) -> None:
        """Take the device.

        Raises:
            EngineError: the driver is missing or refuses.
        """
        self._buffers: set[int] = set()
        self._graphs: list[Any] = []
        try:
            _done(driver.cuInit(0))
        except RuntimeError as error:  # the bindings found no driver library
            raise EngineError(f"CUDA: {error}; `ipa-doctor` says what is missing") from error
        self._device: Any = _value(driver.cuDeviceGet(_FIRST))
        _done(driver.cuCtxSetCurrent(_value(driver.cuDevicePrimaryCtxRetain(self._device))))
        self._stream: Any = _value(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))

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
        """Start copying a contiguous array to the device; the array is free to change afterwards."""
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
        graph = _value(ended)
        executable = _value(driver.cuGraphInstantiate(graph, 0))
        _done(driver.cuGraphDestroy(graph))
        self._graphs.append(executable)
        return executable

    def launch(self, graph: Any) -> None:
        """Run a captured graph."""
        _done(driver.cuGraphLaunch(graph, self._stream))

    def forget(self, graph: Any) -> None:
        """Free a captured graph."""
        self._graphs.remove(graph)
        _done(driver.cuGraphExecDestroy(graph))

    def close(self) -> None:
        """Free everything that was made here; calling it twice is fine."""
        if self._stream is None:
            return
        for graph in tuple(self._graphs):
            self.forget(graph)
        for pointer in tuple(self._buffers):
            self.free(pointer)
        _done(driver.cuStreamDestroy(self._stream))
        _done(driver.cuDevicePrimaryCtxRelease(self._device))
        self._stream = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
