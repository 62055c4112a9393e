"""How far our latents are from diffusers'; what the parity table in the README quotes."""

from __future__ import annotations

from typing import Any

import numpy as np

TOLERANCE = 1e-3  # of the latents' range: what is promised. Rounding alone gives some 1e-5, see test_fidelity.py


def assert_same_latents(ours: np.ndarray, theirs: Any) -> None:
    """Compare final latents, and print the difference: `pytest -rP` shows it.

    Args:
        theirs: array or tensor.
    """
    expected = np.asarray(theirs)
    assert ours.shape == expected.shape
    assert ours.dtype == np.float32
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    print(f"relative error {error:.1e}")
    assert error < TOLERANCE, f"relative error {error:.1e}"
