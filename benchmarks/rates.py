"""How fast this machine multiplies matrices and moves memory: the floor under every step."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ipa.engines.errors import IpaError
from ipa.engines.machine import available_cores

SIDE = {"cpu": 4096, "cuda": 8192}  # of square matrices, large enough for the full rate
COPY_BYTES = {"cpu": 2**29, "cuda": 2**30}  # beyond every cache; twice that is allocated
RUNS = 5
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float16",)}


class RatesError(IpaError):
    """The rates could not be measured."""


def measured(device: str) -> dict[str, Any]:
    """`matmul_gflops` by dtype and `bandwidth_gb_per_second`, measured in a process that then gives its memory back.

    Raises:
        RatesError: it failed; the message is its last line.
    """
    command = [sys.executable, "-m", "ipa.benchmarks.rates", device, str(SIDE[device]), str(COPY_BYTES[device])]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except subprocess.CalledProcessError as error:
        words = error.stderr.strip().splitlines()
        raise RatesError(f"its process ended with code {error.returncode}: {words[-1] if words else ''}") from error
    rates: dict[str, Any] = json.loads(told.splitlines()[-1])
    return rates


def matmul_gflops(dtype: str, device: str = "cpu") -> float:
    """Billions of operations a second in a large matrix product, the best of some runs."""
    torch.set_num_threads(available_cores())
    side = SIDE[device]
    matrix = torch.randn(side, side, device=device).to(getattr(torch, dtype))
    return 2 * side**3 / 1e9 / _seconds(lambda: matrix @ matrix, device)


def bandwidth_gb_per_second(device: str = "cpu") -> float:
    """Billions of bytes a second, read and written, in a large copy, the best of some runs."""
    torch.set_num_threads(available_cores())
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES[device] / 1e9 / _seconds(lambda: target.copy_(source), device)


def floor_seconds(gflop: float, weights: int, dtype: str, matmul: float, bandwidth: float) -> float:
    """The least that a call could take at these rates: to compute, or to read the weights, whichever is longer.

    Args:
        gflop: billions of operations.
        weights: how many, each read once.
        matmul, bandwidth: rates, as above.
    """
    return max(gflop / matmul, weights * BYTES[dtype] / 1e9 / bandwidth)


def _seconds(call: Callable[[], object], device: str) -> float:
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main() -> None:
    """Print the rates of a device: name, side of the matrices, bytes of the copy."""
    device, SIDE[sys.argv[1]], COPY_BYTES[sys.argv[1]] = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    matmul = {dtype: matmul_gflops(dtype, device) for dtype in DTYPES[device]}
    print(json.dumps({"matmul_gflops": matmul, "bandwidth_gb_per_second": bandwidth_gb_per_second(device)}))


if __name__ == "__main__":
    main()
