"""What the NVIDIA driver says of this machine, asked through its own library: no package is needed for that."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute in cuda.h
_NAME_LENGTH = 256


@dataclass(frozen=True)
class Gpu:
    """One device.

    Attributes:
        name: as NVIDIA sells it.
        capability: compute capability, such as `9.0`.
        memory: in bytes.
    """

    name: str
    capability: str
    memory: int


@dataclass(frozen=True)
class Driver:
    """The driver and its devices.

    Attributes:
        cuda: newest CUDA version that it serves, (major, minor).
        gpus: in the driver's order; engines use the first.
    """

    cuda: tuple[int, int]
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class NoDriver:
    """Why there is no GPU to use."""

    reason: str


def find_driver() -> Driver | NoDriver:
    """Ask the driver; never raises."""
    try:
        cuda = ctypes.CDLL(_LIBRARY)
    except OSError:
        return NoDriver(f"no NVIDIA driver here ({_LIBRARY} cannot be loaded)")
    if code := cuda.cuInit(0):
        return NoDriver(f"the NVIDIA driver finds no GPU that it can use (cuInit gives {code})")
    version, count = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(version)) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return NoDriver("the NVIDIA driver does not answer")
    gpus = tuple(_gpu(cuda, index) for index in range(count.value))
    major, minor = divmod(version.value, 1000)
    return Driver((major, minor // 10), gpus) if gpus else NoDriver("the NVIDIA driver finds no GPU")


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device = ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    name = ctypes.create_string_buffer(_NAME_LENGTH)
    cuda.cuDeviceGetName(name, _NAME_LENGTH, device)
    memory = ctypes.c_size_t()
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    numbers = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        number = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        numbers.append(str(number.value))
    return Gpu(name.value.decode(errors="replace"), ".".join(numbers), memory.value)
