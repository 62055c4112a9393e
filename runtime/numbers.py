"""What counts as a number in a request."""

from __future__ import annotations

from typing import TypeGuard

# Far beyond any scale of use, and small enough that its product with a half-precision value seldom overflows.
MAX_NUMBER = 1000
NUMBER_TEXT = f"a finite number of at most {MAX_NUMBER}"


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number, finite and of a sane size; JSON also has whole numbers that no float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER
