"""A speed record as a section: what its figures say, its tables and its plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ipa.benchmarks.intervals import Interval
from ipa.benchmarks.records import SpeedRecord
from ipa.benchmarks.report_numbers import MISSING, figure, inverse, optional, scaled, spread, unit_of
from ipa.benchmarks.report_parts import Section, Table, facts, lead, not_measured
from ipa.benchmarks.report_plots import plot_rates, plot_ratios, plot_stages

LABELS = {
    "model_title": "model",
    "model": "model asked for",
    "images": "images per call",
    "unet_batch": "UNet batch",
    "height": "height, pixels",
    "width": "width, pixels",
    "steps": "denoising steps",
    "unet_calls": "calls of the UNet in a whole run",
    "guidance_scale": "guidance scale",
    "image_tokens": "image tokens",
    "block_steps": "steps per measured block",
    "pairs": "measured pairs per contender",
    "threads": "CPU threads",
    "bundle_created_by": "bundle made with",
}
LEAD = (
    "images per call: {images}",
    "UNet batch: {unet_batch}",
    "{width}x{height} pixels",
    "{steps} steps",
    "{scheduler}",
    "guidance scale {guidance_scale}",
    "image tokens: {image_tokens}",
    "machine: {device}",
)
STAGES = {"text": "text encoder", "image": "image encoder", "adapter": "IP-Adapter", "vae_decoder": "VAE decoder"}
RATES = {"matmul_gflops": ("matrix product,", "GFLOP/s"), "bandwidth_gb_per_second": ("memory bandwidth", "GB/s")}
NONE, IN_STEP = "none in this run", "in the step"
FEW = 5  # rounds: the range of fewer covers a median less often than 95 times in 100
NO_DIFFERENCE = "no difference that this run could tell"


def speed_section(file: str, record: SpeedRecord, anchor: str) -> Section:
    """The section of one speed record.

    Args:
        file: name of the record.
        anchor: of the section; its plots' names begin with it.
    """
    setting, machine = record.setting, record.origin.machine
    title = setting.get("model_title") or setting.get("model") or "model without a name"
    plots = [
        plot_rates(f"{anchor}-rates", record),
        plot_ratios(f"{anchor}-ratios", record),
        plot_stages(f"{anchor}-stages", record, STAGES),
    ]
    return Section(
        kind="speed",
        anchor=anchor,
        title=f"Speed: {title}, {setting.get('task', 'denoising')}",
        lead=lead(setting | {"device": machine.get("gpu") or machine.get("cpu")}, LEAD),
        headlines=tuple(_headlines(record)),
        warnings=tuple(_warnings(record)),
        remarks=tuple(_remarks(record)),
        plots=tuple(plot for plot in plots if plot is not None),
        sheets=(),
        tables=tuple(_tables(record)),
        command=record.origin.command,
        facts=facts(file, setting, LABELS, record.origin),
    )


def _verdict(ratio: Interval, name: str, baseline: str) -> str:
    """One contender against the baseline, in a sentence without its full stop."""
    if ratio.covers(1):
        return f"Between {name} and {baseline} there is {NO_DIFFERENCE}: a ratio of {spread(ratio, 1)}"
    end = "" if ratio.value > 1 else ", which is slower"
    return f"{name} is {_times(ratio)} times as fast as {baseline}{_interval(ratio)}{end}"


def is_null_broken(record: SpeedRecord) -> bool:
    """Whether the baseline differs from itself."""
    return record.null is not None and not record.null.covers(1)


def _times(ratio: Interval) -> str:
    return spread(ratio, 1).partition(" ")[0]


def _interval(ratio: Interval) -> str:
    return spread(ratio, 1).removeprefix(_times(ratio))


def _headlines(record: SpeedRecord) -> list[str]:
    if is_null_broken(record):
        return ["No ratio of this run should be believed: its baseline differs from itself."]
    compared = [(row, row.ratio) for row in record.contenders if row.ratio is not None]
    dtypes = {row.name: row.dtype for row in record.contenders}
    baseline = dtypes.get(record.baseline)
    sentences = []
    for row, ratio in compared:
        name, against = row.name, record.baseline
        if baseline is not None and row.dtype != baseline:
            name, against = f"{name} in {row.dtype}", f"{against} in {baseline}"
        sentences.append(f"{_verdict(ratio, name, against)}.")
    if not compared:
        sentences = [
            f"{row.name} makes {spread(inverse(row.step_seconds))} steps per second; nothing was compared with it."
            for row in record.contenders
        ]
    return sentences


def _warnings(record: SpeedRecord) -> list[str]:
    found = []
    if is_null_broken(record) and record.null is not None:
        found.append(
            f"Null: {record.baseline} against itself came out at {spread(record.null, 1)}, which does not cover 1. "
            "Something other than the engines changed while this ran, so no ratio of this run should be believed."
        )
    if record.null is None and any(row.ratio for row in record.contenders):
        found.append(
            f"There is no null: {record.baseline} was not measured against itself, so nothing shows how far a ratio of "
            "this run is moved by chance alone."
        )
    pairs = record.setting.get("pairs")
    if isinstance(pairs, int) and pairs < FEW:
        found.append(f"Each ratio has {pairs} rounds only; an interval of so few is no more than their range.")
    restless = [row.name for row in record.contenders if not row.is_settled]
    if restless:
        found.append(
            f"Warm-up did not settle for {', '.join(restless)}: no two of its blocks agreed within 2 %, so these "
            "figures may be of a machine whose speed was still changing."
        )
    return found


def _remarks(record: SpeedRecord) -> list[str]:
    if record.null is None or is_null_broken(record):
        return []
    return [f"Null: {record.baseline} against itself came out at {spread(record.null, 1)}, which covers 1, as it must."]


def _tables(record: SpeedRecord) -> list[Table]:
    tables = [_contenders(record), _loop(record), _whole(record), _cost(record)] if record.contenders else []
    if record.overhead:
        tables.append(_overhead(record))
    if record.start_up:
        rows = [
            (row.name, figure(row.import_seconds), figure(row.rss_mib), figure(row.installed_mb))
            for row in record.start_up
        ]
        columns = ("What", "Import, s", "Memory after it, MiB", "Installed size, MB")
        tables.append(Table("Start-up and footprint", columns, tuple(rows)))
    return [*tables, *_floor(record), *not_measured(record.not_measured)]


def _contenders(record: SpeedRecord) -> Table:
    rows = []
    for row in record.contenders:
        blocks = "block" if row.warm_up_blocks == 1 else "blocks"
        warm_up = f"{'settled' if row.is_settled else 'not settled'} after {row.warm_up_blocks} {blocks}"
        rows.append((row.name, row.title, row.dtype, warm_up))
    columns = ("Contender", "What it is", "dtype", "Warm-up")
    return Table("Contenders", columns, tuple(rows), columns[1:])


def _loop(record: SpeedRecord) -> Table:
    unit, factor, text = _times_of([row.step_seconds.value for row in record.contenders])
    has_events = any(row.device_step_seconds is not None for row in record.contenders)
    rows = []
    for row in record.contenders:
        step = row.step_seconds
        ratio = spread(row.ratio, 1) if row.ratio else "1 (baseline)" if row.name == record.baseline else MISSING
        by_device = [text(row.device_step_seconds)] if has_events else []
        cells = [row.name, ratio, spread(scaled(step, factor)), *by_device, spread(inverse(step))]
        rows.append((*cells, text(row.floor_seconds), optional(row.times_floor)))
    columns = [
        *("Contender", f"Times as fast as {record.baseline}", f"Step, {unit}"),
        *([f"Step by the device's events, {unit}"] if has_events else []),
        *("Steps per second", f"Floor of a step, {unit}", "Step over floor"),
    ]
    return Table("Denoising loop", tuple(columns), tuple(rows))


def _whole(record: SpeedRecord) -> Table:
    stages = list(dict.fromkeys(stage for row in record.contenders for stage in row.stage_seconds))
    units = {
        stage: _times_of([row.stage_seconds[stage] for row in record.contenders if stage in row.stage_seconds])
        for stage in stages
    }
    rows = []
    for row in record.contenders:
        times = [units[stage][2](row.stage_seconds.get(stage)) for stage in stages]
        if "adapter" in stages and "adapter" not in row.stage_seconds:
            times[stages.index("adapter")] = IN_STEP
        rows.append((row.name, figure(row.seconds_per_image), figure(row.images_per_second), *times))
    names = (f"{STAGES.get(stage, stage.replace('_', ' '))}, {units[stage][0]}" for stage in stages)
    columns = ("Contender", "Seconds per image", "Images per second", *names)
    return Table("Whole pictures, and the stages around the loop", columns, tuple(rows))


def _cost(record: SpeedRecord) -> Table:
    """Columns that no contender has a figure for are left out."""
    has_build = any(row.build_seconds is not None for row in record.contenders)
    has_device = any(row.peak_device_mib is not None for row in record.contenders)
    rows = []
    for row in record.contenders:
        cells = [row.name, figure(row.first_call_seconds), figure(row.load_seconds)]
        cells += [NONE if row.build_seconds is None else figure(row.build_seconds)] if has_build else []
        rows.append((*cells, figure(row.peak_host_mib), *([optional(row.peak_device_mib)] if has_device else [])))
    columns = [
        *("Contender", "First call, s", "Load, s", *(["Build, s"] if has_build else []), "Peak host memory, MiB"),
        *(["Peak device memory, MiB"] if has_device else []),
    ]
    return Table("Before the first picture, and memory", tuple(columns), tuple(rows))


def _overhead(record: SpeedRecord) -> Table:
    unit, _, text = _times_of([time for row in record.overhead for time in (row.with_seconds, row.without_seconds)])
    rows = []
    for row in record.overhead:
        ratio = row.ratio
        longer = scaled(Interval(ratio.value - 1, ratio.low - 1, ratio.high - 1, ratio.count), 100)
        told = NO_DIFFERENCE if ratio.covers(1) else f"{spread(longer, 0)} %"
        times = (text(row.with_seconds), text(row.without_seconds))
        rows.append((row.name, row.contender, str(row.tokens), *times, spread(ratio, 1), told))
    columns = (
        *("What", "Contender", "Image tokens", f"Step with, {unit}", f"Step without, {unit}"),
        *("With over without", "More time with it"),
    )
    return Table("What the image prompt costs a step", columns, tuple(rows), ("Contender", "More time with it"))


def _floor(record: SpeedRecord) -> list[Table]:
    """What the floor was computed from: the work, and the rates of this machine."""
    names = {name: STAGES.get(name, name.replace("_", " ")) for name in record.gflop} | {
        "unet": "UNet, a step of the whole batch"
    }
    rows = [(names[name], f"{figure(value, 5)} GFLOP") for name, value in record.gflop.items()]
    for name, value in record.rates.items():
        label, unit = RATES.get(name, (name.replace("_", " "), ""))
        for key, rate in value.items() if isinstance(value, dict) else [("", value)]:
            text = figure(float(rate)) if isinstance(rate, int | float) else str(rate)
            rows.append((f"{label} {key}".strip(), f"{text} {unit}".strip()))
    return [Table("Operations of the model, and rates of this machine", ("What", "Value"), tuple(rows))] if rows else []


def _times_of(seconds: Sequence[float]) -> tuple[str, float, Callable[[float | None], str]]:
    """A column's unit, how many of it are a second, and how to write one of its times."""
    unit, factor = unit_of(seconds)
    return unit, factor, lambda value: MISSING if value is None else figure(value * factor)
