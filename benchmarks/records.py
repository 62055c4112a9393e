"""What the benchmarks leave behind: one JSON file for each run, with all that is needed to judge its figures."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ipa.benchmarks.intervals import Interval
from ipa.engines.errors import IpaError
from ipa.trainer.files import atomic_path

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Origin:
    """Where figures come from.

    Attributes:
        command: that measures them again.
        created: date and time, UTC, ISO 8601.
        machine: `system`, `cpu`, `cores`, `memory_gib` and `gpu`, in words; no GPU is an empty string.
        versions: of every library that took part.
    """

    command: str
    created: str
    machine: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True)
class NotMeasured:
    """A row that is missing, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Speed:
    """One contender of a speed run.

    Attributes:
        name: such as `torch-eager`, `torch-compile`, `onnxruntime-plain`, or a back-end of ours.
        title: for people.
        dtype: that it computes in.
        step_seconds: one step of the denoising loop, guidance and scheduler included; the median.
        device_step_seconds: the same by the device's own events, where it has them.
        ratio: how many times as fast as the baseline its loop is: the median of paired ratios; the baseline has none.
        stage_seconds: medians of `text`, `image` (the encoder), `adapter`, `vae_decoder`, and what the task adds.
        seconds_per_image: `steps` steps and every stage, added up, by the pictures of a call.
        images_per_second: the same, the other way round.
        first_call_seconds: the first loop block and the first of each stage, warm-up included.
        load_seconds: from the start of the process until it could be called.
        build_seconds: of engines that were built before, if they were in this run.
        peak_host_mib: of its process, as the system counts it.
        peak_device_mib: largest of readings after warm-up, rounds and stages, less what was in use before its process.
        floor_seconds: a step at the machine's own matrix product rate and memory bandwidth, whichever is longer;
            `None`: the model's sizes or the rate are not known.
        times_floor: `step_seconds` over that; below 1 where an algorithm needs fewer operations than are counted.
        warm_up_blocks: that ran before two agreed within 2 %; `is_settled` is false where none did.
    """

    name: str
    title: str
    dtype: str
    step_seconds: Interval
    device_step_seconds: float | None
    ratio: Interval | None
    stage_seconds: dict[str, float]
    seconds_per_image: float
    images_per_second: float
    first_call_seconds: float
    load_seconds: float
    build_seconds: float | None
    peak_host_mib: float
    peak_device_mib: float | None
    floor_seconds: float | None
    times_floor: float | None
    warm_up_blocks: int
    is_settled: bool


@dataclass(frozen=True)
class Overhead:
    """What the image prompt costs a step.

    Attributes:
        name: such as `hoisted, 4 tokens`.
        contender: that ran it.
        ratio: seconds of a step with over without.
    """

    name: str
    contender: str
    tokens: int
    with_seconds: float
    without_seconds: float
    ratio: Interval


@dataclass(frozen=True)
class StartUp:
    """What a process costs before its first picture: importing, memory after that, and size on disk."""

    name: str
    import_seconds: float
    rss_mib: float
    installed_mb: float


@dataclass(frozen=True)
class SpeedRecord:
    """A run of `ipa-bench speed`.

    Attributes:
        setting: `model`, `model_title`, `task`, `images` (a call), `unet_batch`, `height`, `width`, `steps`,
            `scheduler`, `guidance_scale`, `image_tokens`, `block_steps`, `pairs`, `threads`,
            `bundle_created_by` (versions that the bundle was exported with).
        gflop: of one call, by component: `unet` is a step of the whole batch.
        rates: measured here: `matmul_gflops` by dtype, and `bandwidth_gb_per_second`.
        baseline: the contender that ratios are to.
        null: the baseline against itself, measured like a contender: it must cover 1.
    """

    origin: Origin
    setting: dict[str, Any]
    gflop: dict[str, float]
    rates: dict[str, Any]
    baseline: str
    null: Interval | None
    contenders: list[Speed]
    overhead: list[Overhead] = field(default_factory=list)
    start_up: list[StartUp] = field(default_factory=list)
    not_measured: list[NotMeasured] = field(default_factory=list)


@dataclass(frozen=True)
class Quality:
    """One arm of a quality run: everything that one way to draw made.

    Attributes:
        name: `engine`, `torch-eager`, or `base` for the model without image prompt.
        title: for people.
        clip_i: cosine of the pictures' and the image prompts' CLIP embeddings, the mean.
        clip_t: the same of pictures and texts, raw: not times 2.5 as in the paper (arXiv:2104.08718) nor times 100 as
            torchmetrics gives it; `None` with the demo's CLIP, whose text projection is not shipped.
        dino: cosine of DINO's embeddings of pictures and image prompts.
        fid: Fréchet distance of the pictures to the data's.
        rates: shares that only the demo's judge can tell, such as `foreground colour`.
        seconds_per_image: the median. Arms draw one after the other; `ipa-bench speed` is what compares their speed.
    """

    name: str
    title: str
    clip_i: Interval
    clip_t: Interval | None
    dino: Interval | None
    fid: Interval | None
    rates: dict[str, float]
    seconds_per_image: float


@dataclass(frozen=True)
class Difference:
    """How far two arms' pictures of the same seeds are apart.

    Attributes:
        first, second: names of the arms.
        psnr: decibels, the mean over pictures; equal pictures count as 100.
        lowest_psnr: of the picture that differs most.
        lpips: perceptual distance, where weights were given.
    """

    first: str
    second: str
    psnr: Interval
    lowest_psnr: float
    lpips: Interval | None


@dataclass(frozen=True)
class Sweep:
    """The engine's pictures at several `ip_adapter_scale`s.

    Attributes:
        scales: ascending.
        clip_i, clip_t: means at each scale; `clip_t` as in `Quality`.
        sheet: file name of the contact sheet, beside the record.
    """

    scales: list[float]
    clip_i: list[float]
    clip_t: list[float] | None
    sheet: str


@dataclass(frozen=True)
class QualityRecord:
    """A run of `ipa-bench quality`.

    Attributes:
        setting: `bundle`, `data`, `images`, `samples`, `engine`, `height`, `width`, `steps`, `scheduler`,
            `guidance_scale`, `ip_adapter_scale`, `clip`, and of the metrics what decides them, such as `fid_resize`.
    """

    origin: Origin
    setting: dict[str, Any]
    arms: list[Quality]
    differences: list[Difference] = field(default_factory=list)
    sweep: Sweep | None = None
    not_measured: list[NotMeasured] = field(default_factory=list)


Record = SpeedRecord | QualityRecord
_KINDS: dict[str, type[SpeedRecord] | type[QualityRecord]] = {"speed": SpeedRecord, "quality": QualityRecord}


def write_record(record: Record, file: Path) -> None:
    """Write a record whole or not at all; its kind and format version stand first."""
    kind = next(kind for kind, made in _KINDS.items() if isinstance(record, made))
    text = json.dumps({"kind": kind, "format_version": FORMAT_VERSION, **asdict(record)}, indent=1, ensure_ascii=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        temporary.write_text(text + "\n", "utf-8")


def read_record(file: Path) -> Record | None:
    """A record, checked; `None`: the file is JSON, but none of ours.

    Raises:
        IpaError: the file cannot be read, is of a newer format or lacks something.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise IpaError(f"{file} cannot be read as a record: {error}; run `ipa-bench` again") from error
    if not isinstance(content, dict) or content.get("kind") not in _KINDS:
        return None
    kind, version = content.pop("kind"), content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise IpaError(f"{file} is of format {version!r}, this is {FORMAT_VERSION}; run `ipa-bench {kind}` again")
    adapter: TypeAdapter[Any] = TypeAdapter(_KINDS[kind])
    try:
        record: Record = adapter.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise IpaError(f"{file}: '{where}': {first['msg']}; run `ipa-bench {kind}` again") from error
    return record
