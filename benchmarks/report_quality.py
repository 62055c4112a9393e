"""A quality record as a section, and the join of quality with speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath

from ipa.benchmarks.intervals import Interval
from ipa.benchmarks.records import Difference, Quality, QualityRecord, SpeedRecord
from ipa.benchmarks.report_numbers import MISSING, figure, percent, scaled, spread
from ipa.benchmarks.report_parts import Picture, Section, Table, facts, lead, not_measured
from ipa.benchmarks.report_plots import Point, plot_quality_against_speed, plot_sweep

LABELS = {
    "images": "image prompts",
    "samples": "pictures per image prompt",
    "height": "height, pixels",
    "width": "width, pixels",
    "steps": "denoising steps",
    "guidance_scale": "guidance scale",
    "unet_sha256": "UNet, SHA-256",
    "data_layout": "layout of the data",
    "skipped": "skipped items of the data",
    "is_image_only": "texts left out",
    "torch": "PyTorch's device and dtype",
    "clip": "CLIP model",
    "clip_sha256": "CLIP model, SHA-256",
    "dino": "DINO model",
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
BASE, ENGINE = "base", "engine"


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
    arms = {arm.name: arm for arm in record.arms}
    if {BASE, ENGINE} <= arms.keys():
        sentences.append(_effect(arms[ENGINE].clip_i, arms[BASE].clip_i))
    sentences += [
        f"Pictures of {row.first} and {row.second} from the same seeds are {spread(row.psnr)} dB apart (PSNR, the "
        f"mean; higher is closer); the two that differ most, {figure(row.lowest_psnr)} dB."
        for row in record.differences
    ]
    return sentences


def _effect(adapter: Interval, base: Interval) -> str:
    """Whether the image prompt shows in CLIP-I."""
    if adapter.low <= base.high and base.low <= adapter.high:
        return "With and without the image prompt, the intervals of CLIP-I overlap: this run could tell no effect."
    more = "more" if adapter.value > base.value else "less"
    return (
        f"With the image prompt, pictures are {more} like it than without, by "
        f"{figure(abs(adapter.value - base.value))} in CLIP-I; the intervals do not overlap."
    )


def _tables(record: QualityRecord) -> list[Table]:
    tables = []
    if record.arms:
        tables.append(_arms(record.arms))
    names = list(dict.fromkeys(name for arm in record.arms for name in arm.rates))
    if names:
        shares = [
            (arm.name, *(percent(arm.rates[name]) if name in arm.rates else MISSING for name in names))
            for arm in record.arms
        ]
        tables.append(Table("Rates that the demo's judge gave", ("Arm", *names), tuple(shares)))
    if record.differences:
        tables.append(_differences(record.differences))
    if record.sweep is not None:
        cosines = {"CLIP-I, cosine": record.sweep.clip_i, "CLIP-T, raw cosine": record.sweep.clip_t}
        measured = {title: values for title, values in cosines.items() if values is not None}
        rows = zip(record.sweep.scales, *measured.values(), strict=True)
        cells = tuple((f"{scale:g}", *map(figure, values)) for scale, *values in rows)
        tables.append(Table("Scale sweep of the engine", ("ip_adapter_scale", *measured), cells))
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
            figure(arm.seconds_per_image),
        )
        for arm, *values in zip(arms, *shown.values(), strict=True)
    ]
    columns = ("Arm", "What it is", *shown, "Seconds per image, median")
    return Table("Likeness, with 95 % intervals", columns, tuple(rows), ("What it is",))


def _differences(differences: Sequence[Difference]) -> Table:
    has_lpips = any(row.lpips is not None for row in differences)
    rows = []
    for row in differences:
        lpips = [spread(row.lpips) if row.lpips else MISSING] if has_lpips else []
        rows.append((f"{row.first} and {row.second}", spread(row.psnr), figure(row.lowest_psnr), *lpips))
    columns = ("Pictures of", "PSNR, dB", "Lowest PSNR, dB", *(["LPIPS, distance"] if has_lpips else []))
    return Table("Differences on the same seeds", columns, tuple(rows))


def _beside_speed(record: QualityRecord, anchor: str, speeds: Sequence[tuple[str, SpeedRecord]]) -> Picture | None:
    """CLIP-I over speed, by the first speed record of the same model, size, steps and scheduler, if there is one."""
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
                f"Images per second are those of {file}, joined by model, size, steps and scheduler "
                f"(images per call there: {images})."
            )
            return plot_quality_against_speed(f"{anchor}-speed", points, joined)
    return None


def _is_same(quality: QualityRecord, speed: SpeedRecord) -> bool:
    """Whether both drew with one model in one setting; a model is known by its name or its folder's name."""
    bundle, model = (Path(str(name)).name for name in (quality.setting.get("bundle"), speed.setting.get("model")))
    settings = (quality.setting, speed.setting)
    same = all(key in settings[0] and settings[0][key] == settings[1].get(key) for key in JOINED)
    return bundle == model and same
