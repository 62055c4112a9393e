"""What every back-end offers: a function of named arrays that is also a context manager."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ipa.engines.errors import EngineError
from ipa.engines.spec import ComponentSpec

Array = NDArray[Any]


@dataclass(frozen=True)
class GraphFile:
    """A component on disk, as back-ends get it.

    Attributes:
        component: of the spec table, `ip_adapter/NAME` or `controlnet/NAME`.
        spec: what the manifest says of inputs and outputs.
        path: of the graph; its external data, if any, lies beside it.
        sha256: over graph and data, by which engine plans are found; empty for a graph outside a bundle.
        bundle: the folder it is from, for messages.
        plans: folder of engine plans that the user trusts; `None`: the user's own cache.
    """

    component: str
    spec: ComponentSpec
    path: Path
    sha256: str = ""
    bundle: Path = Path()
    plans: Path | None = None


class Engine(Protocol):
    """One opened component. Call it with named arrays, close it or use it in a `with` block.

    An array that is marked read-only (`array.flags.writeable` is false) and passed again is taken for unchanged: an
    engine with memory of its own need not copy it twice.
    """

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


def check_names(graph: GraphFile, found: list[str]) -> None:
    """Refuse a graph whose inputs are not the spec's, in its order.

    Raises:
        EngineError: says both.
    """
    expected = [tensor.name for tensor in graph.spec.inputs]
    if found != expected:
        raise EngineError(f"{graph.component}: {graph.path} takes inputs {found}, the manifest says {expected}")


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
