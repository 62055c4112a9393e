"""A quality record as a section, and the join of quality with speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath

from ipa.benchmarks.intervals import Interval
from ipa.benchmarks.records import Difference, Gap, Quality, QualityRecord, SpeedRecord, Sweep
from ipa.benchmarks.report_numbers import MISSING, figure, percent, scaled, signed, spread
from ipa.benchmarks.report_parts import Picture, Section, Table, facts, lead, not_measured
from ipa.benchmarks.report_plots import Point, plot_quality_against_speed, plot_sweep, sweep_size
from ipa.benchmarks.report_speed import NO_DIFFERENCE, is_null_broken

LABELS = {
    "images": "image prompts",
    "samples": "pictures per image prompt",
    "height": "height, pixels",
    "width": "width, pixels",
    "steps": "denoising steps",
    "guidance_scale": "guidance scale",
    "unet_files_sha256": "UNet, SHA-256 of its files' sums",
    "engine_version": "engine's library",
    "engine_dtype": "engine's dtype (UNet)",
    "base": "base model for PyTorch",
    "base_sha256": "base model for PyTorch, SHA-256 of its files' sums",
    "adapter": "IP-Adapter for PyTorch",
    "adapter_sha256": "IP-Adapter for PyTorch, SHA-256",
    "image_encoder": "image encoder for PyTorch",
    "image_encoder_sha256": "image encoder for PyTorch, SHA-256 of its files' sums",
    "data_layout": "layout of the data",
    "skipped": "skipped items of the data",
    "is_image_only": "texts left out",
    "torch": "PyTorch's device and dtype",
    "clip": "CLIP model",
    "clip_sha256": "CLIP model, SHA-256",
    "dino": "DINO model",
    "dino_sha256": "DINO model, SHA-256",
    "lpips": "LPIPS by",
    "lpips_sha256": "AlexNet for LPIPS, SHA-256",
    "inception": "Inception for FID",
    "inception_sha256": "Inception for FID, SHA-256",
    "fid_implementation": "FID by",
    "fid_resize": "resizing for FID",
    "fid_pictures": "pictures for FID",
    "fid_interval": "interval of FID",
    "sheet": "contact sheet",
}
LEAD = (
    "image prompts: {images}",
    "pictures of each: {samples}",
    "{width}x{height} pixels",
    "{steps} steps",
    "{scheduler}",
    "guidance scale {guidance_scale}",
    "ip_adapter_scale {ip_adapter_scale}",
    "engine: {engine}",
)
CLIP_T = {
    1.0: "CLIP-T, raw cosine",
    2.5: "CLIP-T times 2.5, as in the paper",
    100.0: "CLIP-T times 100, as in torchmetrics",
}
JOINED = ("height", "width", "steps", "scheduler")
MACHINE = ("cpu", "gpu")
TASK = "variation"  # what a quality run draws
BASE, ENGINE = "base", "engine"
ALL_EQUAL = "all equal"
MEASURES = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "dino": "DINO"}


def quality_section(
    file: str, record: QualityRecord, anchor: str, sheets: Sequence[Picture], speeds: Sequence[tuple[str, SpeedRecord]]
) -> Section:
    """The section of one quality record.

    Args:
        file: name of the record.
        anchor: of the section; its plots' names begin with it.
        sheets: contact sheets, of the arms and of the sweep.
        speeds: records, by file name, that may be of the same model.
    """
    setting = record.setting
    plots = [_beside_speed(record, anchor, speeds)]
    if record.sweep is not None:
        plots.append(plot_sweep(f"{anchor}-sweep", record.sweep))
    return Section(
        kind="quality",
        anchor=anchor,
        title=f"Quality: {PurePath(str(setting.get('bundle', 'bundle without a name'))).name}",
        lead=lead(setting, LEAD),
        headlines=tuple(_headlines(record)),
        warnings=(),
        remarks=(),
        plots=tuple(plot for plot in plots if plot is not None),
        sheets=tuple(sheets),
        tables=tuple(_tables(record)),
        command=record.origin.command,
        facts=facts(file, setting, LABELS, record.origin),
    )


def _headlines(record: QualityRecord) -> list[str]:
    sentences = []
    if record.arms:
        likeness = "; ".join(f"{arm.name} {spread(arm.clip_i)}" for arm in record.arms)
        sentences.append(f"CLIP-I, likeness to the image prompt: {likeness}.")
        following = "; ".join(f"{arm.name} {spread(arm.clip_t)}" for arm in record.arms if arm.clip_t)
        sentences += [f"CLIP-T, likeness to the text, raw cosine: {following}."] if following else []
    for gap in record.gaps:
        if gap.measure == "clip_i" and gap.value.count > 1:  # of one image prompt there is no telling
            has_texts = not record.setting.get("is_image_only")
            sentences.append(_effect(gap.value, has_texts) if gap.second == BASE else _agreement(gap))
    return sentences + [_apart(row) for row in record.differences]


def _effect(gap: Interval, has_texts: bool) -> str:
    """Whether the image prompt shows in CLIP-I, paired with the base model's pictures of the same seeds."""
    if has_texts:
        first, second = "With the image prompt", "without it"
        both = "with and without the image prompt"
    else:
        first, second = "From the image prompt alone", "the base model's, from the text alone"
        both = "from the image prompt alone and the base model's, from the text alone,"
    mean = f"on the same seeds, CLIP-I differs by {signed(gap)} in the mean."
    if gap.covers(0):
        return f"Between pictures {both} this run could tell no effect: {mean}"
    return f"{first}, pictures are {'more' if gap.value > 0 else 'less'} like it than {second}: {mean}"


def _agreement(gap: Gap) -> str:
    told = f": {NO_DIFFERENCE}" if gap.value.covers(0) else ""
    return f"CLIP-I of {gap.first} and {gap.second} differs by {signed(gap.value)} in the mean on the same seeds{told}."


def _apart(row: Difference) -> str:
    pictures = f"Of the pictures that {row.first} and {row.second} drew from the same seeds, "
    if row.psnr is None or row.lowest_psnr is None:
        return f"{pictures}all are equal, pixel by pixel."
    share = percent(row.equal.value)
    some = f"{share} are equal, pixel by pixel; the others' PSNR" if row.equal.value else "no two are equal; their PSNR"
    return (
        f"{pictures}{some} is {spread(row.psnr)} dB (the median; higher is closer), and of the two that differ most "
        f"{figure(row.lowest_psnr)} dB."
    )


def _tables(record: QualityRecord) -> list[Table]:
    tables = []
    if record.arms:
        tables.append(_arms(record.arms))
    names = list(dict.fromkeys(name for arm in record.arms for name in arm.rates))
    if names:
        shares = [
            (arm.name, *(spread(scaled(arm.rates[name], 100)) if name in arm.rates else MISSING for name in names))
            for arm in record.arms
        ]
        tables.append(
            Table("Rates that the demo's judge gave", ("Arm", *(f"{name}, %" for name in names)), tuple(shares))
        )
    if record.gaps:
        tables.append(_gaps(record.gaps))
    if record.differences:
        tables.append(_differences(record.differences))
    if record.sweep is not None:
        tables.append(_scales(record.sweep))
    return [*tables, *not_measured(record.not_measured)]


def _arms(arms: Sequence[Quality]) -> Table:
    """Each measure that some arm has."""
    measures: dict[str, list[Interval | None]] = {"CLIP-I, cosine": [arm.clip_i for arm in arms]}
    for factor, title in CLIP_T.items():
        measures[title] = [scaled(arm.clip_t, factor) if arm.clip_t else None for arm in arms]
    measures["DINO, cosine"] = [arm.dino for arm in arms]
    measures["FID, squared feature distance"] = [arm.fid for arm in arms]
    shown = {title: values for title, values in measures.items() if any(values)}
    rows = [
        (
            *(arm.name, arm.title),
            *(spread(value) if value else MISSING for value in values),
        )
        for arm, *values in zip(arms, *shown.values(), strict=True)
    ]
    columns = ("Arm", "What it is", *shown)
    return Table("Likeness, with 95 % intervals", columns, tuple(rows), ("What it is",))


def _gaps(gaps: Sequence[Gap]) -> Table:
    """A row for two arms, a column for each measure that some row has."""
    found = {(f"{gap.first} minus {gap.second}", gap.measure): gap.value for gap in gaps}
    measures = list(dict.fromkeys(measure for _, measure in found))
    rows = tuple(
        (name, *(signed(found[name, measure]) if (name, measure) in found else MISSING for measure in measures))
        for name in dict.fromkeys(name for name, _ in found)
    )
    columns = (MEASURES.get(measure, measure.replace("_", " ")) for measure in measures)
    return Table("Paired differences on the same seeds", ("Arms", *columns), rows)


def _scales(sweep: Sweep) -> Table:
    cosines = {"CLIP-I, cosine": sweep.clip_i, "CLIP-T, raw cosine": sweep.clip_t}
    measured = {title: values for title, values in cosines.items() if values is not None}
    rows = zip(sweep.scales, *measured.values(), strict=True)
    cells = tuple((f"{scale:g}", *map(spread, values)) for scale, *values in rows)
    return Table(f"Scale sweep of the engine: {sweep_size(sweep)}", ("ip_adapter_scale", *measured), cells)


def _differences(differences: Sequence[Difference]) -> Table:
    has_lpips = any(row.lpips is not None for row in differences)
    rows = []
    for row in differences:
        lpips = [spread(row.lpips) if row.lpips else MISSING] if has_lpips else []
        psnr = spread(row.psnr) if row.psnr else ALL_EQUAL
        lowest = ALL_EQUAL if row.lowest_psnr is None else figure(row.lowest_psnr)
        rows.append((f"{row.first} and {row.second}", spread(scaled(row.equal, 100)), psnr, lowest, *lpips))
    columns = (
        *("Pictures of", "Equal pictures, %", "PSNR of the others, median, dB", "Lowest PSNR, dB"),
        *(["LPIPS, distance"] if has_lpips else []),
    )
    return Table("Differences between pictures of the same seeds", columns, tuple(rows))


def _beside_speed(record: QualityRecord, anchor: str, speeds: Sequence[tuple[str, SpeedRecord]]) -> Picture | None:
    """CLIP-I over speed, by the first speed record of the same work on the same machine, if there is one."""
    for file, speed in speeds:
        if not _is_same(record, speed):
            continue
        rates = {row.name: row.images_per_second for row in speed.contenders}
        names = {arm.name: record.setting.get("engine") if arm.name == ENGINE else arm.name for arm in record.arms}
        points = [
            Point(str(names[arm.name]), rates[str(names[arm.name])], arm.clip_i)
            for arm in record.arms
            if names[arm.name] in rates
        ]
        if points:
            images = speed.setting.get("images", 1)
            joined = (
                f"Images per second are those of {file}, joined by model, task, size, steps, scheduler, guidance "
                f"and machine (images per call there: {images})."
            )
            return plot_quality_against_speed(f"{anchor}-speed", points, joined)
    return None


def _is_same(quality: QualityRecord, speed: SpeedRecord) -> bool:
    """Whether both drew with one model in one setting on one machine, and the speed can be believed.

    A model is known by its name or its folder's name.
    """
    bundle, model = (Path(str(name)).name for name in (quality.setting.get("bundle"), speed.setting.get("model")))
    settings, machines = (quality.setting, speed.setting), (quality.origin.machine, speed.origin.machine)
    same = all(key in settings[0] and settings[0][key] == settings[1].get(key) for key in JOINED)
    same &= all(machines[0].get(key) == machines[1].get(key) for key in MACHINE)
    guidance = [_guidance(setting.get("guidance_scale")) for setting in settings]
    return (
        bundle == model
        and same
        and speed.setting.get("task") == TASK
        and None not in guidance
        and guidance[0] == guidance[1]
        and not is_null_broken(speed)
    )


def _guidance(scale: object) -> bool | None:
    """The scale as far as it costs time, 1 and below are off; `None`: it is not known."""
    return scale > 1 if isinstance(scale, int | float) else None
