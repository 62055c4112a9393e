"""From the options of `ipa-bench speed` to its record."""

from __future__ import annotations

import re
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ipa.benchmarks import flops, rates
from ipa.benchmarks.contender import Setting
from ipa.benchmarks.engine_build import build_engine
from ipa.benchmarks.entries import NAMES, entries
from ipa.benchmarks.models import DEMO, PRESETS, Models, demo, preset, users_own
from ipa.benchmarks.origin import origin
from ipa.benchmarks.overhead import measure_overhead, pairs
from ipa.benchmarks.progress import progress_bar
from ipa.benchmarks.records import NotMeasured, SpeedRecord, write_record
from ipa.benchmarks.speed_run import Outcome, SpeedRun, Work
from ipa.benchmarks.start_up import start_ups
from ipa.engines.bundle import Bundle
from ipa.engines.cuda_driver import NoDriver, find_driver
from ipa.engines.errors import RequestError
from ipa.engines.registry import BACKENDS
from ipa.engines.tensorrt_library import MODULES
from ipa.runtime.pipeline import Pipeline
from ipa.runtime.preparation import Preparation

QUICK = (DEMO, "small")  # whose whole loop is one block


@dataclass(frozen=True)
class SpeedOptions:
    """As `ipa-bench speed --help` has them; `names`: of contenders, `None` is all."""

    model: str
    output: Path
    folder: Path
    task: str = "variation"
    names: tuple[str, ...] | None = None
    resolution: str | None = None
    batch: int = 1
    steps: int = 25
    block_steps: int | None = None
    scheduler: str = "ddim"
    guidance_scale: float = 5.0
    pairs: int = 7
    base: Path | None = None
    adapter: Path | None = None
    controlnet: str | None = None
    overhead: bool = True
    start_up: bool = True


def measure_speed(options: SpeedOptions) -> tuple[SpeedRecord, Path]:
    """Measure, and write the record.

    Returns:
        The record and its file.
    Raises:
        IpaError: an option does not fit, or no contender can run.
    """
    has_gpu = not isinstance(find_driver(), NoDriver)
    device = "cuda" if has_gpu else "cpu"
    models = _models(options, "float16" if has_gpu else "float32")
    bundle = Bundle.open(models.bundle, verify=False)
    setting = _setting(options, bundle, models.control, has_gpu)
    with Pipeline.open(models.bundle, verify=False) as pipe:
        pipe.batch_key(setting.request())  # what does not fit is known before anything is timed
    calls = len(Preparation(bundle).run(setting.request()).schedule.timesteps)  # fewer from an image on, PNDM: one more
    setting = replace(setting, block_steps=min(setting.block_steps, calls))
    wanted = options.names or NAMES
    built, failed = _built(bundle, wanted, f"{setting.width}x{setting.height}")
    found, missing = entries([name for name in wanted if name not in failed], models, setting, device, built)
    if not found:
        raise RequestError(f"no contender can run: {'; '.join(f'{one.name}: {one.reason}' for one in missing)}")
    missing += [NotMeasured(name, reason) for name, reason in failed.items()]
    gflop, weights = _sizes(models, setting)
    measured = _rates(device)

    def floor(dtype: str) -> float | None:
        is_whole = setting.task != "controlnet"  # whose operations are not counted
        if not gflop or not is_whole or dtype not in measured["matmul_gflops"]:
            return None
        matmul, bandwidth = measured["matmul_gflops"][dtype], measured["bandwidth_gb_per_second"]
        return rates.floor_seconds(gflop["unet"], weights, dtype, matmul, bandwidth)

    has_overhead = options.overhead and options.model in PRESETS and options.model != "sdxl"
    has_overhead &= options.task == "variation" and options.batch == 1
    running = {entry.name for entry in found}
    ours = [backend.name for backend in BACKENDS if backend.name in running and backend.name not in MODULES]
    total = 4 * options.pairs * (len(found) + (len(ours) * 2 + 3 if has_overhead else 0))
    work = Work(setting.block_steps, calls, setting.images, floor)
    file = options.output / f"speed_{_file_part(models.name)}_{setting.task}.json"
    with progress_bar(total) as progress:
        outcome = SpeedRun(found, work, options.pairs, _device_memory, progress).run()
        _check_any(outcome)
        record = SpeedRecord(
            origin=origin(),
            setting=_described(options, models, setting, bundle) | {"unet_calls": calls},
            gflop=gflop,
            rates=measured,
            baseline=outcome.contenders[0].name,
            null=outcome.null,
            contenders=outcome.contenders,
            not_measured=[*outcome.not_measured, *missing],
        )
        write_record(record, file)  # what comes next may be interrupted
        try:
            if has_overhead:
                costs, failed_costs = measure_overhead(pairs(models, setting, ours, device), options.pairs, progress)
                record = replace(record, overhead=costs, not_measured=[*record.not_measured, *failed_costs])
            elif options.overhead:
                reason = "measured for `--model sd15` and `small`, `--task variation`, `--batch 1`"
                record = _lacking(record, "cost of the image prompt", reason)
            if options.start_up:
                progress("start-up", 0)
                record = replace(record, start_up=start_ups())
        except KeyboardInterrupt:
            record = _lacking(record, "what comes after the contenders", "the run was interrupted")
    write_record(record, file)
    return record, file


def _lacking(record: SpeedRecord, name: str, reason: str) -> SpeedRecord:
    return replace(record, not_measured=[*record.not_measured, NotMeasured(name, reason)])


def _models(options: SpeedOptions, dtype: str) -> Models:
    given = [name for name in ("base", "adapter", "controlnet") if getattr(options, name) is not None]
    if given and options.model in (*PRESETS, DEMO):
        raise RequestError(
            f"--{given[0]} goes with a bundle of yours, --model {options.model} has its own: leave it out"
        )
    if options.model in PRESETS:
        return preset(options.model, options.folder, options.task, dtype)
    if options.model == DEMO:
        return demo(options.folder)
    bundle = Path(options.model)
    if not bundle.is_dir():
        raise RequestError(f"--model {options.model} is no folder, and none of {', '.join((*PRESETS, DEMO))}")
    return users_own(bundle, options.base, options.adapter, options.controlnet)


def _setting(options: SpeedOptions, bundle: Bundle, control: str | None, has_gpu: bool) -> Setting:
    defaults = bundle.manifest.defaults
    width, height = defaults.width, defaults.height
    if options.resolution is not None:
        match = re.fullmatch(r"(\d+)x(\d+)", options.resolution)
        if match is None:
            raise RequestError(f"--resolution is {options.resolution!r}, expected WIDTHxHEIGHT, such as 512x512")
        width, height = int(match[1]), int(match[2])
    block = options.block_steps or (options.steps if options.model in QUICK or has_gpu else 1)
    return Setting(
        task=options.task,
        images=options.batch,
        height=height,
        width=width,
        steps=options.steps,
        block_steps=min(block, options.steps),
        scheduler=options.scheduler,
        guidance_scale=options.guidance_scale,
        control=control,
    )


def _built(bundle: Bundle, names: tuple[str, ...], resolution: str) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds that building took by engine, and why it failed."""
    seconds, failed = dict[str, float](), dict[str, str]()
    if isinstance(find_driver(), NoDriver):
        return seconds, failed
    for backend in BACKENDS:
        if backend.name in MODULES and backend.name in names and backend.is_installed:
            try:
                built, _, took = build_engine(bundle, backend.name, resolution)
            except Exception as error:  # whatever one engine does, the others are measured
                failed[backend.name] = f"its engines could not be built: {error}"
            else:
                seconds |= {backend.name: took} if built else {}
    return seconds, failed


def _sizes(models: Models, setting: Setting) -> tuple[dict[str, float], int]:
    """Billions of operations by component, and the UNet's weights; nothing where only a bundle is known."""
    if models.base is None:
        return {}, 0
    return (
        flops.pipeline_gflop(models.base, setting.unet_batch, setting.height, setting.width),
        flops.unet_weights(models.base),
    )


def _rates(device: str) -> dict[str, Any]:
    dtypes = ("float16",) if device == "cuda" else ("float32", "bfloat16")
    return {
        "matmul_gflops": {dtype: rates.matmul_gflops(dtype, device) for dtype in dtypes},
        "bandwidth_gb_per_second": rates.bandwidth_gb_per_second(device),
    }


def _described(options: SpeedOptions, models: Models, setting: Setting, bundle: Bundle) -> dict[str, Any]:
    from ipa.engines.machine import available_cores

    adapter = bundle.manifest.defaults.adapter
    described = asdict(setting)
    del described["has_image"], described["control"]
    return described | {
        "model": models.name,
        "model_title": models.title,
        "unet_batch": setting.unet_batch,
        "image_tokens": bundle.manifest.adapters[adapter].tokens if adapter else 0,
        "pairs": options.pairs,
        "threads": available_cores(),
    }


def _device_memory() -> float | None:
    """MiB in use on the first GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _file_part(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def _check_any(outcome: Outcome) -> None:
    if not outcome.contenders:
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in outcome.not_measured)
        raise RequestError(f"no contender could be measured: {reasons}")
