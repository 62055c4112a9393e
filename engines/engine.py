"""What every back-end offers: a function of named arrays that is also a context manager."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ipa.engines.errors import EngineError
from ipa.engines.spec import ComponentSpec

Array = NDArray[Any]


class Engine(Protocol):
    """One opened component. Call it with named arrays, close it or use it in a `with` block."""

    component: str
    spec: ComponentSpec
    precision: str  # float32, float16 or bfloat16: what most of it is computed in
    load_seconds: float  # spent so far on opening and compiling, within a call too

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        """Outputs by name.

        Raises:
            EngineError: an array does not fit `spec`, or the engine failed on it.
        """

    def close(self) -> None:
        """Give back what the engine holds; calling it twice is fine."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def describe(array: Array) -> str:
    """An array as error messages show it: `float32(2, 4, 64, 64)`."""
    return f"{array.dtype}({', '.join(map(str, array.shape))})"


def check_inputs(component: str, spec: ComponentSpec, inputs: Mapping[str, Array]) -> None:
    """Refuse what does not fit the spec: engines never convert silently.

    Raises:
        EngineError: a name is missing or unknown, a dtype or shape differs, or two inputs
            disagree about a free axis such as `batch`.
    """
    names = [tensor.name for tensor in spec.inputs]
    if sorted(names) != sorted(inputs):
        raise EngineError(f"{component}: got inputs {sorted(inputs)}, expected {sorted(names)}")
    free: dict[str, int] = {}
    for tensor in spec.inputs:
        array = inputs[tensor.name]
        fits = str(array.dtype) == tensor.dtype and array.ndim == len(tensor.axes)
        if fits:
            for axis, size in zip(tensor.axes, array.shape, strict=True):
                fits &= size == (axis if isinstance(axis, int) else free.setdefault(axis, size))
        if not fits:
            known = ", ".join(f"{axis} = {size}" for axis, size in free.items() if axis in tensor.axes)
            raise EngineError(
                f"{component}: input '{tensor.name}' is {describe(array)}, expected {tensor}"
                + (f" with {known}" if known else "")
            )


def check_finite(component: str, outputs: Mapping[str, Array]) -> None:
    """Refuse outputs that hold NaN or infinity: a black picture is never a success.

    Raises:
        EngineError: names the component and the output.
    """
    for name, array in outputs.items():
        if not np.isfinite(array).all():
            raise EngineError(
                f"{component}: output '{name}' holds NaN or infinity; this component overflows in "
                f"{array.dtype}: export the bundle again with `ipa-export onnx ... --dtype fp32`"
            )
