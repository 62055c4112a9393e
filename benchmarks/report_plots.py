"""Plots as SVG that reads well on light and dark pages and comes out the same, byte for byte, each time."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ipa.benchmarks.intervals import Interval
from ipa.benchmarks.records import SpeedRecord, Sweep
from ipa.benchmarks.report_numbers import figure, inverse, spread
from ipa.benchmarks.report_parts import Picture

WIDTH = 4.9  # inches: as wide as a phone, so that the letters are readable there
ROW = 0.36  # inches
# Of middling lightness: at least 3 to 1 against white and against a dark page.
COLOURS = ("#3b82c4", "#d9730d", "#2e9e5b", "#9a6dd7", "#d6524f", "#1f9aa8", "#a9784f", "#c2559d")
QUIET = "#808890"
_TEXT = "#010203"  # becomes the page's own text colour
_STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": _TEXT,
    "text.parse_math": False,  # a `$` in a name is a `$`
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": QUIET,
    "axes.labelcolor": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": QUIET,
    "grid.alpha": 0.35,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Point:
    """An arm of a quality run beside its speed."""

    name: str
    images_per_second: float
    clip_i: Interval


def plot_rates(name: str, record: SpeedRecord) -> Picture | None:
    """Bars of steps per second with intervals; `None` without contenders."""
    rows = [(row.name, inverse(row.step_seconds)) for row in record.contenders]

    def paint(drawn: Figure) -> None:
        axes = drawn.add_subplot()
        for place, (_, rate) in enumerate(rows):
            axes.barh(place, rate.value, 0.6, color=COLOURS[0])
            axes.errorbar(rate.value, place, xerr=_ends(rate), color=_TEXT, capsize=3, linewidth=1)
            _label(axes, rate.high, place, figure(rate.value))
        _rows(axes, [row for row, _ in rows])
        axes.set_xlim(0, 1.2 * max(rate.high for _, rate in rows))
        axes.set_xlabel("denoising steps per second")

    return _draw(name, "Denoising steps per second, with 95 % intervals.", len(rows), paint) if rows else None


def plot_ratios(name: str, record: SpeedRecord) -> Picture | None:
    """Ratios to the baseline with their intervals, the null first; `None` without ratios."""
    rows = [(row.name, row.ratio, COLOURS[0]) for row in record.contenders if row.ratio is not None]
    if not rows:
        return None
    if record.null is not None:
        rows.insert(0, (f"null: {record.baseline}", record.null, QUIET))

    def paint(drawn: Figure) -> None:
        axes = drawn.add_subplot()
        axes.axvline(1, color=QUIET, linewidth=1.5, linestyle="--")
        for place, (_, ratio, colour) in enumerate(rows):
            axes.errorbar(ratio.value, place, xerr=_ends(ratio), color=colour, marker="o", markersize=5, capsize=3)
            _label(axes, ratio.high, place, spread(ratio, 1).partition(" ")[0])
        _rows(axes, [row for row, _, _ in rows])
        low, high = min(1.0, *(row.low for _, row, _ in rows)), max(1.0, *(row.high for _, row, _ in rows))
        span = max(high - low, 0.02)
        axes.set_xlim(low - 0.08 * span, high + 0.22 * span)
        axes.set_xlabel(f"times as fast as {record.baseline}")

    caption = f"Times as fast as {record.baseline}, with 95 % intervals; an interval that meets the line at 1 shows no "
    return _draw(name, caption + "difference.", len(rows), paint)


def plot_stages(name: str, record: SpeedRecord, titles: dict[str, str]) -> Picture | None:
    """A call's time, stage upon stage; `None` where the number of steps is not known.

    Args:
        titles: of stages, for people.
    """
    steps = record.setting.get("unet_calls")
    if not record.contenders or not isinstance(steps, int) or isinstance(steps, bool):
        return None
    stages = list(dict.fromkeys(stage for row in record.contenders for stage in row.stage_seconds))
    before = [stage for stage in stages if stage != "vae_decoder"]
    parts = [(titles.get(stage, stage.replace("_", " ")), stage) for stage in before]
    parts += [("denoising loop", "")] + [(titles.get(stage, stage), stage) for stage in stages if stage not in before]

    def paint(drawn: Figure) -> None:
        axes = drawn.add_subplot()
        starts = [0.0] * len(record.contenders)
        for number, (title, stage) in enumerate(parts):
            times = [
                row.stage_seconds.get(stage, 0.0) if stage else steps * row.step_seconds.value
                for row in record.contenders
            ]
            colour = COLOURS[number % len(COLOURS)]
            axes.barh(range(len(times)), times, 0.6, left=starts, color=colour, label=title)
            starts = [start + time for start, time in zip(starts, times, strict=True)]
        for place, whole in enumerate(starts):
            _label(axes, whole, place, f"{figure(whole)} s")
        _rows(axes, [row.name for row in record.contenders])
        axes.set_xlim(0, 1.22 * max(starts))
        axes.set_xlabel("seconds of a call")
        drawn.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9.5)

    images = record.setting.get("images", 1)
    caption = f"Time of a call (images: {images}, steps: {steps}) by stage, from the medians."
    return _draw(name, caption, len(record.contenders) + 0.55 * -(-len(parts) // 2), paint)


def plot_quality_against_speed(name: str, points: Sequence[Point], joined: str) -> Picture:
    """CLIP-I over images per second.

    Args:
        joined: says which records the two sides are from.
    """

    def paint(drawn: Figure) -> None:
        axes = drawn.add_subplot()
        for number, point in enumerate(points):
            axes.errorbar(
                *(point.images_per_second, point.clip_i.value),
                yerr=_ends(point.clip_i),
                color=COLOURS[number % len(COLOURS)],
                marker="o",
                capsize=3,
                linestyle="none",
                label=_short(point.name),
            )
        axes.set_xlim(0, 1.1 * max(point.images_per_second for point in points))
        axes.margins(y=0.25)
        axes.set_xlabel("images per second")
        axes.set_ylabel("CLIP-I, cosine")
        axes.grid()
        drawn.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9.5)

    return _draw(name, f"CLIP-I over speed, with 95 % intervals of CLIP-I. {joined}", 7, paint)


def plot_sweep(name: str, sweep: Sweep) -> Picture:
    """CLIP-I and, if it was measured, CLIP-T over the scale, one above the other as their ranges differ."""
    rows = [(sweep.clip_i, "CLIP-I, cosine")]
    rows += [(sweep.clip_t, "CLIP-T, raw cosine")] if sweep.clip_t is not None else []

    def paint(drawn: Figure) -> None:
        parts = drawn.subplots(len(rows), sharex=True, squeeze=False)[:, 0]
        for part, colour, (values, label) in zip(parts, COLOURS, rows, strict=False):
            means = [value.value for value in values]
            ends = np.hstack([_ends(value) for value in values])
            part.errorbar(sweep.scales, means, yerr=ends, color=colour, marker="o", markersize=4, capsize=3)
            part.margins(y=0.15)
            part.set_ylabel(label)
            part.grid()
        parts[-1].set_xlabel("ip_adapter_scale")

    measures = " and ".join(label.partition(",")[0] for _, label in rows)
    caption = f"{measures} over the scale, with 95 % intervals: {sweep_size(sweep)}."
    return _draw(name, caption, 5 * len(rows), paint)


def sweep_size(sweep: Sweep) -> str:
    """What its figures are of, in words."""
    prompts = "the first image prompt" if sweep.images == 1 else f"the first {sweep.images} image prompts"
    return f"{prompts}, pictures of each: {sweep.samples}"


def _draw(name: str, caption: str, rows: float, paint: Callable[[Figure], None]) -> Picture:
    """What `paint` draws, as tall as so many rows."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        drawn = Figure(figsize=(WIDTH, ROW * rows + 0.85), layout="constrained")
        paint(drawn)
        buffer = io.StringIO()
        FigureCanvasSVG(drawn)
        drawn.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return Picture(name, caption, "svg", _element(buffer.getvalue(), name, caption).encode())


def _element(document: str, name: str, caption: str) -> str:
    """The `<svg>` alone, fit to stand beside others in a page: own ids, no style sheet, the page's text colour."""
    svg = document[document.index("<svg") :]
    for part in (r"<!--.*?-->\s*", r"<style.*?</style>\s*", r"<metadata>.*?</metadata>\s*"):
        svg = re.sub(part, "", svg, flags=re.DOTALL)
    inside = svg[svg.index(">") + 1 :]
    view = re.search(r'viewBox="([^"]+)"', svg)
    assert view is not None, "matplotlib writes one"
    _, _, width, height = view[1].split()
    size = f'width="{width}" height="{height}" viewBox="{view[1]}"'
    head = f'<svg role="img" aria-label="{escape(caption)}" {size} stroke-linejoin="round">'
    # In tags only: a name that a plot shows stays as it is.
    return head + re.sub(r"<[^<>]+>", lambda tag: _own(tag[0], name), inside).strip() + "\n"


def _own(tag: str, name: str) -> str:
    tag = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", tag)
    return tag.replace(_TEXT, "currentColor")


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """A row for each name, the first on top."""
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= 28 else f"{name[:27]}…"


def _label(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9.5)


def _ends(interval: Interval) -> list[list[float]]:
    """Distances of the ends, as matplotlib wants them."""
    return [[max(interval.value - interval.low, 0)], [max(interval.high - interval.value, 0)]]
