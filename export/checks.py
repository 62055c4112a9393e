"""Outcomes of validation and what counts as agreement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ipa.engines.engine import Array

# Largest error allowed, as a part of the reference's largest value. FP32 keeps 24 bits (6e-8) and sums of some
# thousand products in another order differ by 1e-6 to 1e-5. FP16 keeps 11 bits (5e-4): about 100 roundings one
# after the other make 5e-3 where they are independent; 2e-3 was the most seen on a tiny model. BF16 keeps 3 bits
# less than FP16: 8 times as much.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}
MIN_PSNR = 35.0  # dB, of the picture that a whole run ends in: differences below it are hard to see


@dataclass(frozen=True)
class Check:
    """One line of the validation table."""

    name: str
    passed: bool
    relative_error: float  # largest error (of a picture: its RMS) / largest reference value; a change likewise
    tolerance: float
    max_abs_error: float = 0.0
    mean_abs_error: float = 0.0
    cosine: float = 1.0
    worst: str = ""  # the case with the largest relative error, or the engine's message
    is_change: bool = False  # passes when the output moves by more than the tolerance
    psnr: float | None = None  # dB, of a picture; it decides, not the tolerance
    own_psnr: float | None = None  # dB, of the model's own picture from noise changed by one part in a thousand
    is_judged: bool = True  # else it passes, and says nothing of the bundle

    def __str__(self) -> str:
        verdict = "--  " if not self.is_judged else "ok  " if self.passed else "FAIL"
        if not self.is_judged and self.psnr is None:
            return f"{verdict} {self.name:28} not compared: {self.worst}"
        relation = ">" if self.is_change else "<="
        limit = f"{relation} {self.tolerance:.0e}" if self.psnr is None else self._picture_limit(self.psnr)
        return (
            f"{verdict} {self.name:28} abs {self.max_abs_error:8.2e} "
            f"mean {self.mean_abs_error:8.2e}  rel {self.relative_error:8.2e} {limit}  "
            f"cos {self.cosine:.7f}  {self.worst}"
        )

    def _picture_limit(self, psnr: float) -> str:
        if not self.is_judged:
            return f"psnr {psnr:.1f} dB, not judged: 1e-3 more noise alone gives {self.own_psnr:.1f} dB (untrained?)"
        return f"psnr {psnr:.1f} >= {MIN_PSNR:.0f} dB"


def agreement(
    name: str,
    case: str,
    found: Mapping[str, Array],
    expected: Mapping[str, Array],
    tolerance: float,
    is_picture: bool = False,
) -> Check:
    """Compare all outputs of one call.

    Args:
        name, case: for the report.
        found, expected: by output.
        tolerance: for the largest error, as a part of the reference's largest value.
        is_picture: judge by the root mean square of the errors. A trained decoder is steep where colours meet: the
            rounding of its input moves an edge, and a pixel on it errs by 20 times what the picture does.
    """
    return worst(
        [
            _compare(
                name,
                f"{case}: {output}" if len(expected) > 1 else case,
                found[output],
                reference,
                tolerance,
                is_picture,
            )
            for output, reference in expected.items()
        ]
    )


def change(name: str, first: Array, second: Array, error: float) -> Check:
    """Passes when two outputs differ by clearly more than `error`, the relative error of such outputs."""
    check = _compare(name, "", first, second, 2 * error)
    return replace(check, passed=check.relative_error > 2 * error, is_change=True)


def picture(name: str, case: str, found: Array, expected: Array, disturbed: Array) -> Check:
    """Compare two pictures.

    Args:
        found, expected: (3, height, width) in 0 to 1.
        disturbed: what the reference model makes of noise that is changed by one part in a thousand. Random weights
            turn that into another picture; a run of such a model says nothing about an engine, and is not judged.
    """
    check = _compare(name, case, found, expected, tolerance=0.0)
    if found.shape != expected.shape:
        return check
    psnr, own_psnr = _psnr(found, expected), _psnr(disturbed, expected)
    is_judged = own_psnr >= MIN_PSNR
    passed = psnr >= MIN_PSNR or not is_judged
    return replace(check, psnr=psnr, own_psnr=own_psnr, passed=passed, is_judged=is_judged)


def median(checks: Sequence[Check]) -> Check:
    """The middle one of several pictures."""
    return sorted(checks, key=lambda check: check.psnr or 0.0)[len(checks) // 2]


def _psnr(found: Array, expected: Array) -> float:
    """Peak signal-to-noise ratio of pictures in 0 to 1, in dB; 120 where they are equal."""
    return -10 * math.log10(max(float(np.square(found - expected, dtype=np.float64).mean()), 1e-12))


def failure(name: str, message: str, tolerance: float) -> Check:
    """An engine that gave no output."""
    return Check(name, passed=False, relative_error=float("inf"), tolerance=tolerance, cosine=0.0, worst=message)


def not_compared(name: str, reason: str) -> Check:
    """What a bundle holds and nobody looked at; no figure of it is finite."""
    unknown = math.inf
    return Check(name, True, unknown, 0.0, unknown, unknown, worst=reason, is_judged=False)


def worst(checks: Sequence[Check]) -> Check:
    """The check with the largest relative error."""
    return max(checks, key=lambda check: check.relative_error)


def _compare(name: str, case: str, found: Array, expected: Array, tolerance: float, is_picture: bool = False) -> Check:
    left, right = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    if left.shape != right.shape:
        return failure(name, f"{case}: shape {found.shape}, expected {expected.shape}", tolerance)
    errors = np.abs(left - right)
    error, extent = float(errors.max()), float(np.abs(right).max())
    judged = math.sqrt(np.square(errors).mean()) if is_picture else error
    relative = judged / extent if extent else judged
    norms = float(np.linalg.norm(left) * np.linalg.norm(right))
    cosine = float(left @ right) / norms if norms else float(not np.any(left - right))
    return Check(name, relative <= tolerance, relative, tolerance, error, float(errors.mean()), cosine, case)
