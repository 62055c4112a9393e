"""Outcomes of validation and what counts as agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ipa.engines.engine import Array

# Largest error allowed, as a part of the reference's largest value. FP32 keeps 24 bits (6e-8) and sums of some
# thousand products in another order differ by 1e-6 to 1e-5. FP16 keeps 11 bits (5e-4): about 100 roundings one
# after the other make 5e-3 where they are independent; 2e-3 was the most seen on a tiny model.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2}


@dataclass(frozen=True)
class Check:
    """One line of the validation table."""

    name: str
    passed: bool
    relative_error: float  # largest error / largest reference value; the relative change where `is_change`
    tolerance: float
    max_abs_error: float = 0.0
    cosine: float = 1.0
    worst: str = ""  # the case with the largest relative error, or the engine's message
    is_change: bool = False  # passes when the output moves by more than the tolerance

    def __str__(self) -> str:
        relation = ">" if self.is_change else "<="
        return (
            f"{'ok  ' if self.passed else 'FAIL'} {self.name:28} abs {self.max_abs_error:8.2e}  "
            f"rel {self.relative_error:8.2e} {relation} {self.tolerance:.0e}  cos {self.cosine:.7f}  {self.worst}"
        )


def agreement(
    name: str, case: str, found: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float
) -> Check:
    """Compare all outputs of one call."""
    return worst(
        [
            _compare(name, f"{case}: {output}" if len(expected) > 1 else case, found[output], reference, tolerance)
            for output, reference in expected.items()
        ]
    )


def change(name: str, first: Array, second: Array, tolerance: float) -> Check:
    """Passes when two outputs differ by clearly more than the error that is allowed."""
    check = _compare(name, "", first, second, tolerance)
    return replace(check, passed=check.relative_error > tolerance, is_change=True)


def failure(name: str, message: str, tolerance: float) -> Check:
    """An engine that gave no output."""
    return Check(name, passed=False, relative_error=float("inf"), tolerance=tolerance, cosine=0.0, worst=message)


def worst(checks: Sequence[Check]) -> Check:
    """The check with the largest relative error."""
    return max(checks, key=lambda check: check.relative_error)


def _compare(name: str, case: str, found: Array, expected: Array, tolerance: float) -> Check:
    left, right = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    if left.shape != right.shape:
        return failure(name, f"{case}: shape {found.shape}, expected {expected.shape}", tolerance)
    error, extent = float(np.abs(left - right).max()), float(np.abs(right).max())
    relative = error / extent if extent else error
    norms = float(np.linalg.norm(left) * np.linalg.norm(right))
    cosine = float(left @ right) / norms if norms else float(not np.any(left - right))
    return Check(name, relative <= tolerance, relative, tolerance, error, cosine, case)
