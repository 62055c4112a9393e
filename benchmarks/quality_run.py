"""A run of `ipa-bench quality`: read, draw every arm, measure, write the record."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ipa.benchmarks.bundle_origin import check_adapter, source_folder, torch_obstacle
from ipa.benchmarks.demo_weights import restored_demo
from ipa.benchmarks.origin import origin
from ipa.benchmarks.quality_arms import BASE, ENGINE, SHARED, SWEEP, TORCH, Arms, Settings, TorchModel, TorchPainter
from ipa.benchmarks.quality_data import Data, Item, read_data
from ipa.benchmarks.quality_lpips import Lpips
from ipa.benchmarks.quality_measure import DEMO, Eyes, difference, gaps, open_eyes, quality
from ipa.benchmarks.quality_metrics import FID_INTERVAL, similarity
from ipa.benchmarks.quality_models import Inception
from ipa.benchmarks.quality_pictures import SETTINGS_FILE, ArmFolder, Drawn, remove_arms
from ipa.benchmarks.quality_sheets import Row, contact_sheet, save_sheet
from ipa.benchmarks.records import NotMeasured, QualityRecord, Sweep, write_record
from ipa.engines.bundle import Bundle
from ipa.engines.errors import IpaError, first_line
from ipa.engines.registry import backend_named
from ipa.runtime.demo import demo_bundle
from ipa.runtime.image_files import open_image
from ipa.runtime.pipeline import Pipeline

RECORD_FILE, SHEET_FILE, SWEEP_FILE = "quality.json", "sheet.png", "sweep.png"
SHEET_ROWS = 8
TITLES = {ENGINE: "ours", TORCH: "PyTorch eager", BASE: "no image prompt"}


@dataclass(frozen=True)
class Options:
    """What `ipa-bench quality` was asked for; its help says what each is. `None`: not given."""

    output: Path
    data: str
    clip: str
    bundle: Path | None = None
    base: str | None = None
    adapter: Path | None = None
    image_encoder: str | None = None
    image_root: Path | None = None
    dino: Path | None = None
    inception: Path | None = None
    lpips: Path | None = None
    limit: int | None = None
    engine: str = "auto"
    settings: Settings = field(default_factory=Settings)
    sweep: tuple[float, ...] = ()
    is_forced: bool = False


def run_quality(options: Options, report: Callable[[str], None]) -> QualityRecord:
    """Draw, measure and write OUTPUT's files; pictures that are there already are kept.

    Args:
        options: what to do.
        report: told of images that are left out and of slow work.
    Raises:
        IpaError: something given does not fit. What can be checked is, before anything is drawn.
    """
    data = read_data(options.data, options.image_root, options.limit, report)
    pictures = options.output / "pictures"
    with ExitStack() as stack:
        pipe = stack.enter_context(Pipeline.open(options.bundle or demo_bundle(), engine=options.engine))
        eyes, missing = open_eyes(options.clip, options.dino, options.inception, options.output / "embeddings", stack)
        lpips = Lpips(options.lpips) if options.lpips else None
        arms = Arms(pipe, data.items, options.settings, pictures)
        model = _torch_model(options, pipe.bundle, report)
        painter = None
        if isinstance(model, NotMeasured):
            missing.append(model)
        else:
            painter = stack.enter_context(TorchPainter(model))
        if options.is_forced:
            if painter:
                painter.load()  # what cannot be loaded has cost no picture
            remove_arms(_arm_folders(pictures), SHARED)
        folders = _folders(arms, painter, options.sweep)
        drawn, failed = _draw(arms, folders, painter)
        missing += [*failed, *_not_measured(options, drawn, eyes, data)]
        measured = {name: quality(name, TITLES[name], one, data, eyes) for name, one in drawn.items()}
        apart = [gap for name in (BASE, TORCH) if name in measured for gap in gaps(measured[ENGINE], measured[name])]
        differences = [difference(ENGINE, TORCH, drawn[ENGINE], drawn[TORCH], lpips)] if TORCH in drawn else []
        sweep = _sweep(arms, folders, eyes, options) if options.sweep else None
        _write_sheet(data, {TITLES[name]: one for name, one in drawn.items()}, options.output / SHEET_FILE)
        setting = _setting(options, data, arms, pipe, eyes, lpips)
        setting |= _torch_setting(painter.model, folders[TORCH]) if painter and TORCH in drawn else {}
    figures = [one.figures for one in measured.values()]
    record = QualityRecord(origin(), setting, figures, apart, differences, sweep, missing)
    write_record(record, options.output / RECORD_FILE)
    return record


def _torch_model(options: Options, bundle: Bundle, report: Callable[[str], None]) -> TorchModel | NotMeasured:
    """What PyTorch draws with; the demo's is made from its bundle."""
    is_demo = options.bundle is None or options.bundle.resolve() == demo_bundle().resolve()
    apart = {"--adapter": options.adapter, "--image-encoder": options.image_encoder}
    given = [option for option, value in apart.items() if value is not None]
    if options.base is None and (given or not is_demo):
        if given:
            raise IpaError(f"{given[0]} is for PyTorch, which needs --base DIR, too: give both or none")
        if options.lpips is not None:
            raise IpaError("--lpips compares with PyTorch's pictures: add --base DIR --adapter FILE, or leave it out")
        return NotMeasured(TORCH, "give the same model to PyTorch with --base DIR --adapter FILE")
    if options.base in (None, DEMO):
        if not is_demo or given:
            raise IpaError("--base demo goes with the demo's bundle alone, and brings its own adapter")
        report("the demo's weights for PyTorch, from its bundle")
        try:
            return TorchModel(*restored_demo(bundle, options.output / "models" / DEMO))
        except (IpaError, RuntimeError, ValueError) as error:
            return NotMeasured(TORCH, f"its weights cannot be taken from the bundle: {first_line(error)}")
    assert options.base is not None
    if options.adapter is None:
        raise IpaError(f"--base {options.base} needs --adapter FILE: the IP-Adapter that the bundle was made with")
    encoder = options.image_encoder
    model = TorchModel(
        source_folder("--base", options.base, "model_index.json"),
        options.adapter,
        None if encoder is None else source_folder("--image-encoder", encoder, "config.json"),
    )
    model.check()
    check_adapter(bundle, model.adapter)
    obstacle = torch_obstacle(bundle.manifest)
    return NotMeasured(TORCH, obstacle) if obstacle else model


def _arm_folders(pictures: Path) -> list[Path]:
    """Where arms of any run may have drawn."""
    return [*(pictures / name for name in (ENGINE, TORCH, BASE)), *(pictures / SWEEP).glob("*")]


def _folders(arms: Arms, painter: TorchPainter | None, sweep: tuple[float, ...]) -> dict[str, ArmFolder]:
    """Every arm's folder by name, all checked before anything is drawn."""
    folders = {
        ENGINE: arms.engine_folder(ENGINE, arms.jobs),
        BASE: arms.engine_folder(BASE, arms.base_jobs),
    }
    folders |= {name: arms.engine_folder(name, arms.sweep_jobs(scale)) for name, scale in _sweep_names(sweep).items()}
    return folders | ({TORCH: arms.torch_folder(painter.model)} if painter else {})


def _sweep_names(sweep: tuple[float, ...]) -> dict[str, float]:
    """Scales by their folders' names, ascending."""
    return {f"{SWEEP}/{scale:g}": scale for scale in sorted(sweep)}


def _draw(
    arms: Arms, folders: Mapping[str, ArmFolder], painter: TorchPainter | None
) -> tuple[dict[str, Drawn], list[NotMeasured]]:
    """Every arm's pictures but the sweep's, and what failed. PyTorch begins: what it cannot load is known at once."""
    theirs: dict[str, Drawn] = {}
    failed = []
    if painter:
        try:
            theirs[TORCH] = arms.draw_torch(folders[TORCH], painter)
        except (RuntimeError, ValueError) as error:  # out of memory, say: our own arms can do without
            failed.append(NotMeasured(TORCH, f"{type(error).__name__} while it drew: {first_line(error)}"))
        painter.close()
    ours = arms.draw_engine(folders[ENGINE], arms.jobs)
    return {ENGINE: ours, **theirs, BASE: arms.draw_engine(folders[BASE], arms.base_jobs)}, failed


def _sweep(arms: Arms, folders: Mapping[str, ArmFolder], eyes: Eyes, options: Options) -> Sweep:
    """The first image prompts at several scales."""
    scales, clip_i, clip_t, columns = [], [], [], {}
    jobs = arms.sweep_jobs(0)
    items = [job.item for job in jobs]
    for name, scale in _sweep_names(options.sweep).items():
        drawn = arms.draw_engine(folders[name], arms.sweep_jobs(scale))
        seen = [[eyes.clip.picture(file) for file in files] for files in drawn.files]
        scales.append(scale)
        clip_i.append(similarity(seen, [eyes.clip.reference(item) for item in items]))
        if eyes.has_text:
            clip_t.append(similarity(seen, [eyes.clip.text(item.text) for item in items]))
        columns[f"scale {scale:g}"] = _opened(drawn)
    save_sheet(contact_sheet(_rows(items), columns), options.output / SWEEP_FILE)
    samples = jobs[0].request.num_images
    return Sweep(len(items), samples, scales, clip_i, clip_t if eyes.has_text else None, SWEEP_FILE)


def _write_sheet(data: Data, arms: Mapping[str, Drawn], file: Path) -> None:
    save_sheet(contact_sheet(_rows(data.items), {title: _opened(drawn) for title, drawn in arms.items()}), file)


def _rows(items: Sequence[Item]) -> list[Row]:
    return [Row(item.text, open_image(item.reference)) for item in items[:SHEET_ROWS]]


def _opened(drawn: Drawn) -> list[Image.Image]:
    """The first sample of the first image prompts."""
    return [open_image(files[0]) for files in drawn.files[:SHEET_ROWS]]


def _not_measured(options: Options, drawn: Mapping[str, Drawn], eyes: Eyes, data: Data) -> list[NotMeasured]:
    missing = []
    if eyes.inception and len(data.items) == 1:
        missing.append(NotMeasured("FID", "one picture has no spread; take more with --limit"))
    if TORCH in drawn and options.lpips is None:
        missing.append(NotMeasured("LPIPS", "give AlexNet's weights as torchvision has them with --lpips FILE"))
    elif options.lpips is not None and TORCH not in drawn:
        missing.append(NotMeasured("LPIPS", "there are no pictures of PyTorch to compare with"))
    if not options.sweep:
        missing.append(NotMeasured("scale sweep", "ask for it with --sweep 0,0.25,0.5,0.75,1"))
    return missing


def _torch_setting(model: TorchModel, folder: ArmFolder) -> dict[str, Any]:
    """What PyTorch drew with, with the sums that its folder was checked by: to hash gigabytes again takes a while."""
    kept = json.loads((folder.folder / SETTINGS_FILE).read_text("utf-8"))
    found = {
        "torch": " ".join(model.target),
        "base": str(model.base),
        "base_sha256": kept["base"],
        "adapter": str(model.adapter),
        "adapter_sha256": kept["adapter"],
    }
    if model.image_encoder is not None:
        found |= {"image_encoder": str(model.image_encoder), "image_encoder_sha256": kept["image encoder"]}
    return found


def _setting(
    options: Options, data: Data, arms: Arms, pipe: Pipeline, eyes: Eyes, lpips: Lpips | None
) -> dict[str, Any]:
    request, samples = arms.request, options.settings.samples
    setting = {
        "bundle": DEMO if options.bundle is None else str(options.bundle),
        "unet_files_sha256": pipe.bundle.graph("unet").sha256,
        "data": data.name,
        "data_layout": data.layout,
        "images": len(data.items),
        "samples": samples,
        "skipped": data.skipped,
        "is_image_only": options.settings.is_image_only,
        "seeds": "each image prompt's number in the data, from 0",
        "engine": pipe.engine,
        "engine_version": backend_named(pipe.engine).version,
        "engine_dtype": pipe.component("unet").precision,
        "height": request.height,
        "width": request.width,
        "steps": request.num_inference_steps,
        "scheduler": request.scheduler,
        "guidance_scale": request.guidance_scale,
        "ip_adapter_scale": request.ip_adapter_scale,
        "clip": eyes.clip.model.title,
        "clip_sha256": eyes.clip.model.sha256,
        "dino": eyes.dino.model.title if eyes.dino else None,
        "dino_sha256": eyes.dino.model.sha256 if eyes.dino else None,
        "lpips": f"AlexNet, {lpips.title}" if lpips else None,
        "lpips_sha256": lpips.sha256 if lpips else None,
        "intervals": "95 %, image prompts resampled",
        "sheet": SHEET_FILE,
    }
    if eyes.inception:
        size = f"{request.width} x {request.height}"
        setting |= {
            "inception": eyes.inception.model.title,
            "inception_sha256": eyes.inception.model.sha256,
            "fid_implementation": "torchmetrics with torch-fidelity's Inception, 2048 features",
            "fid_resize": f"the data's pictures cropped and scaled to {size} (bicubic), then all {Inception.resize}",
            "fid_pictures": {"data": len(data.items), "drawn": len(data.items) * samples},
            "fid_interval": FID_INTERVAL,
        }
    return setting
