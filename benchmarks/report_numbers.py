"""Figures as text: three significant digits, intervals whose ends can be compared with the value, units."""

from __future__ import annotations

from collections.abc import Iterable

from ipa.benchmarks.intervals import Interval

MOST_DECIMALS = 6  # of an interval that ends close to what it is held against
MISSING = "not measured"


def figure(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, without an exponent: `0.0123`, `1.50`, `7,910`."""
    decimals = _decimals(value, digits)
    return f"{round(value, decimals):,.{max(decimals, 0)}f}"


def optional(value: float | None) -> str:
    """The same of a figure that may be missing."""
    return MISSING if value is None else figure(value)


def percent(share: float) -> str:
    """A share of 1 in per cent."""
    return f"{figure(100 * share)} %"


def spread(interval: Interval, against: float | None = None) -> str:
    """A figure with its interval: `1.50 (1.46 to 1.55)`.

    Args:
        against: what the interval may cover: an end beside it gets as many decimals as it takes not to look like it.
    """
    ends = (interval.low, interval.high)
    decimals = _decimals(interval.value or interval.high or interval.low, 3)
    if width := abs(interval.high - interval.low):  # of a value near 0, no digits that its interval makes idle
        decimals = min(decimals, _decimals(width, 3))
    decimals = max(decimals, 0)
    while decimals < MOST_DECIMALS and any(end != against and round(end, decimals) == against for end in ends):
        decimals += 1
    value, low, high = (f"{number:,.{decimals}f}" for number in (interval.value, *ends))
    return f"{value} (measured once)" if interval.count == 1 and low == high else f"{value} ({low} to {high})"


def signed(interval: Interval) -> str:
    """A difference with its interval: `+0.260 (+0.240 to +0.281)`; an end beside 0 does not look like it."""
    parts = (interval.value, interval.low, interval.high)
    decimals = min(max(_decimals(max(parts, key=abs), 3), 0), MOST_DECIMALS)
    while decimals < MOST_DECIMALS and any(part and not round(part, decimals) for part in parts[1:]):
        decimals += 1
    value, low, high = (f"{part:+z,.{decimals}f}" if round(part, decimals) else f"{0:.{decimals}f}" for part in parts)
    return f"{value} (one pair)" if interval.count == 1 else f"{value} ({low} to {high})"


def scaled(interval: Interval, factor: float) -> Interval:
    """The interval in another unit; `factor` is positive."""
    return Interval(interval.value * factor, interval.low * factor, interval.high * factor, interval.count)


def inverse(interval: Interval) -> Interval:
    """Of seconds for a thing: things in a second."""
    return Interval(1 / interval.value, 1 / interval.high, 1 / interval.low, interval.count)


def unit_of(seconds: Iterable[float]) -> tuple[str, float]:
    """One unit for a column of times, `s` or `ms`, and how many of it are a second."""
    return ("s", 1.0) if max(seconds, default=1.0) >= 1 else ("ms", 1000.0)


def _decimals(value: float, digits: int) -> int:
    """Decimals that show so many significant digits; negative left of the point."""
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value: 9.999 has that of 10.0
    return digits - 1 - exponent if value else 0
