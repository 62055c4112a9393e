"""Inputs that have the right shapes and no meaning; zeros would be faster than real ones on some hardware."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ipa.engines.spec import ComponentSpec, axis_size

TIMESTEP = 500.0
TOKEN_IDS = 256  # that every vocabulary has


def random_inputs(spec: ComponentSpec, free: Mapping[str, int], rng: np.random.Generator) -> dict[str, Any]:
    """Standard normal values for every input, ids where it takes whole numbers; the timestep is fixed.

    Args:
        free: sizes of the free axes.
    """
    inputs: dict[str, Any] = {}
    for tensor in spec.inputs:
        shape = [axis_size(axis, free) for axis in tensor.axes]
        if tensor.dtype.startswith("int"):
            values: Any = rng.integers(1, TOKEN_IDS, shape)
        else:
            values = np.full(shape, TIMESTEP) if tensor.name == "timestep" else rng.standard_normal(shape)
        inputs[tensor.name] = values.astype(tensor.dtype)
    return inputs
