"""How the report writes numbers."""

from __future__ import annotations

import pytest

from ipa.benchmarks.intervals import Interval
from ipa.benchmarks.report_numbers import figure, signed, spread


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.504, "1.50"),
        (9.996, "10.0"),
        (7911.9, "7,910"),
        (0.012349, "0.0123"),
        (-0.5, "-0.500"),
        (2e-7, "0.000000200"),
    ],
)
def test_three_digits(value: float, text: str) -> None:
    assert figure(value) == text


def test_an_end_beside_one_does_not_look_like_one() -> None:
    assert spread(Interval(1.02, 1.001, 1.04, 9), 1) == "1.020 (1.001 to 1.040)"
    assert spread(Interval(1.02, 1.001, 1.04, 9)) == "1.02 (1.00 to 1.04)"
    assert spread(Interval(0.00805, -0.1642, 0.19654, 9)) == "0.008 (-0.164 to 0.197)"
    assert spread(Interval(1.02, 1.02, 1.02, 1), 1) == "1.02 (measured once)"


def test_differences_have_signs() -> None:
    assert signed(Interval(0.26, 0.2431, 0.2778, 64)) == "+0.260 (+0.243 to +0.278)"
    assert signed(Interval(0.02, 0.0001, 0.04, 64)) == "+0.0200 (+0.0001 to +0.0400)"
    assert signed(Interval(0.0, 0.0, 0.0, 64)) == "0 (0 to 0)"
    assert signed(Interval(-1e-9, -2e-9, 1e-9, 64)) == "0.000000 (0.000000 to 0.000000)"
    assert signed(Interval(0.5, 0.5, 0.5, 1)) == "+0.500 (one pair)"
