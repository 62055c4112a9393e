"""Latents that stay on the GPU between the UNet's calls: guidance and the scheduler's update by two kernels of ours."""

from __future__ import annotations

import ctypes
from importlib import resources
from typing import Any

import numpy as np

from ipa.engines.cuda_device import CudaDevice
from ipa.engines.engine import Array
from ipa.engines.linear_run import LinearRun

_THREADS = 256
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


class DeviceLatents:
    """The state of one run in device memory. `CudaDevice` frees it with all else if `free` is not reached."""

    def __init__(self, device: CudaDevice, run: LinearRun, dtype: str) -> None:
        """Upload latents and weights.

        Args:
            run: with at most `ipa.engines.linear_run.MOST_ARRAYS`.
            dtype: of the UNet's input and output, float16 or float32.
        """
        self._device, self._run = device, run
        self._vectors = max(max(step.weights.shape[0], step.weights.shape[1] - 2) for step in run.steps)
        self._count, self._is_half = run.latents.size, int(dtype == "float16")
        self._weights = np.stack([self._padded(step.weights) for step in run.steps])
        state = np.zeros((self._vectors, *run.latents.shape), np.float32)
        state[0] = run.latents
        ptx = resources.files("ipa.engines").joinpath("guided_step.ptx").read_bytes()
        self._write_sample, self._guided_step = device.kernels(ptx, ("write_sample", "guided_step"))
        self._pointers = [device.allocate(array.nbytes) for array in (state, self._weights, run.latents)]
        self._state, self._weights_at, self._noise = self._pointers
        device.upload(self._state, state)
        device.upload(self._weights_at, self._weights)
        device.synchronize()

    def _padded(self, weights: Array) -> Array:
        """(vectors, vectors + 2) float32: arrays that are not there before a step weigh nothing."""
        rows, columns = weights.shape
        padded = np.zeros((self._vectors, self._vectors + 2), np.float32)
        padded[:rows, : columns - 2] = weights[:, :-2]
        padded[:rows, -2:] = weights[:, -2:]
        return padded

    def write_sample(self, index: int, sample: int) -> None:
        """Fill the UNet's input for step `index`, at the address `sample`."""
        values = (self._state, sample, self._run.steps[index].input_scale, self._count, self._run.halves, self._is_half)
        self._launch(self._write_sample, values, (_POINTER, _POINTER, _FLOAT, _INT, _INT, _INT))

    def step(self, index: int, noise_pred: int) -> Array:
        """Go on from the UNet's output at the address `noise_pred`, and wait for it: the latents after step `index`."""
        needs_noise = self._run.steps[index].needs_noise
        if needs_noise:
            noise = np.ascontiguousarray(self._run.draw_noise())  # kept until the device has read it
            self._device.upload(self._noise, noise)
        weights = self._weights_at + index * self._weights[0].nbytes
        sizes = (self._count, self._vectors, self._run.halves, self._is_half, int(needs_noise))
        values = (self._state, noise_pred, self._noise, weights, self._run.guidance_scale or 0.0, *sizes)
        self._launch(self._guided_step, values, (*[_POINTER] * 4, _FLOAT, *[_INT] * len(sizes)))
        latents = np.empty_like(self._run.latents)
        self._device.download(latents, self._state)
        self._device.synchronize()
        return latents

    def _launch(self, function: Any, values: tuple[Any, ...], types: tuple[Any, ...]) -> None:
        self._device.launch_kernel(function, -(-self._count // _THREADS), _THREADS, values, types)

    def free(self) -> None:
        """Give the memory back."""
        for pointer in self._pointers:
            self._device.free(pointer)
