"""From the options of `ipa-bench speed` to its record."""

from __future__ import annotations

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
from ipa.benchmarks.speed_options import SpeedOptions, check, check_fits, own_size
from ipa.benchmarks.speed_run import INTERRUPTED, Outcome, SpeedRun, Work
from ipa.benchmarks.start_up import start_ups
from ipa.engines.bundle import Bundle
from ipa.engines.cuda_driver import NoDriver, find_driver
from ipa.engines.errors import RequestError, first_line
from ipa.engines.registry import BACKENDS
from ipa.engines.tensorrt_library import MODULES
from ipa.runtime.preparation import Preparation

OVERHEAD, START_UP = "cost of the image prompt", "start-up"


@dataclass(frozen=True)
class Measured:
    """A run's record, the file that it is in, and whether Ctrl-C ended the run before all was measured."""

    record: SpeedRecord
    file: Path
    is_interrupted: bool


def measure_speed(options: SpeedOptions) -> Measured:
    """Measure, and write the record; after Ctrl-C with what was measured until then.

    Raises:
        IpaError: an option does not fit, or no contender can run.
        KeyboardInterrupt: before anything was measured.
    """
    check(options)
    has_gpu = not isinstance(find_driver(), NoDriver)
    device = _torch_device() if has_gpu else "cpu"
    models = _models(options, "float16" if has_gpu else "float32")
    bundle = Bundle.open(models.bundle, verify=False)
    setting = options.setting(own_size(bundle), models.control, has_gpu)
    check_fits(bundle, setting)
    calls = len(Preparation(bundle).run(setting.request()).schedule.timesteps)  # fewer from an image on, PNDM: one more
    setting = replace(setting, block_steps=min(setting.block_steps, calls))
    wanted = options.names or NAMES
    built, failed = _built(bundle, wanted, setting)
    found, missing = entries([name for name in wanted if name not in failed], models, setting, device, built)
    if not found:
        raise RequestError(f"no contender can run: {'; '.join(f'{one.name}: {one.reason}' for one in missing)}")
    missing += [NotMeasured(name, reason) for name, reason in failed.items()]
    gflop, weights = _sizes(models, setting)
    try:
        measured = rates.measured(device)
    except rates.RatesError as error:
        measured = {}
        missing.append(NotMeasured("the machine's rates, and the distance to the floor", str(error)))

    def floor(dtype: str) -> float | None:
        is_whole = setting.task != "controlnet"  # whose operations are not counted
        if not gflop or not is_whole or not measured or dtype not in measured["matmul_gflops"]:
            return None
        matmul, bandwidth = measured["matmul_gflops"][dtype], measured["bandwidth_gb_per_second"]
        return rates.floor_seconds(gflop["unet"], weights, dtype, matmul, bandwidth)

    has_overhead = options.overhead and options.model in PRESETS and options.model != "sdxl"
    has_overhead &= options.task == "variation" and options.batch == 1
    running = {entry.name for entry in found}
    ours = [backend.name for backend in BACKENDS if backend.name in running and backend.name not in MODULES]
    total = 4 * options.pairs * (len(found) + (len(ours) * 2 + 3 if has_overhead else 0))
    work = Work(setting.block_steps, calls, setting.images, floor)
    file = options.output / options.record_name(models.name, setting, own_size(bundle))
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
        write_record(record, file)  # what comes next may fail in ways that nobody answers
        is_interrupted = outcome.is_interrupted
        if options.overhead and not has_overhead:
            reason = "measured for `--model sd15` and `small`, `--task variation`, `--batch 1`"
            record.not_measured.append(NotMeasured(OVERHEAD, reason))
        parts = {OVERHEAD: has_overhead, START_UP: options.start_up}
        for part in (name for name, is_wanted in parts.items() if is_wanted):
            try:
                if is_interrupted:
                    raise KeyboardInterrupt
                if part == OVERHEAD:
                    rows = pairs(models, setting, ours, device)
                    measure_overhead(rows, options.pairs, progress, record.overhead, record.not_measured)
                else:
                    progress(START_UP, 0)
                    record.start_up.extend(start_ups())
            except KeyboardInterrupt:
                is_interrupted = True
                record.not_measured.append(NotMeasured(part, INTERRUPTED))
            except Exception as error:  # whatever it is, what was measured is kept
                record.not_measured.append(NotMeasured(part, f"{type(error).__name__}: {first_line(error)}"))
    write_record(record, file)
    return Measured(record, file, is_interrupted)


def _torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _models(options: SpeedOptions, dtype: str) -> Models:
    if options.model in PRESETS:
        return preset(options.model, options.folder, options.task, dtype)
    if options.model == DEMO:
        return demo(options.folder)
    sources = options.base, options.image_encoder, options.adapter, options.controlnet
    return users_own(Path(options.model), *sources)


def _built(bundle: Bundle, names: tuple[str, ...], setting: Setting) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds that building took by engine, and why it failed."""
    seconds, failed = dict[str, float](), dict[str, str]()
    if isinstance(find_driver(), NoDriver):
        return seconds, failed
    for backend in BACKENDS:
        if backend.name in MODULES and backend.name in names and backend.is_installed:
            try:
                built, _, took = build_engine(bundle, backend.name, f"{setting.width}x{setting.height}", setting.images)
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
        "bundle_created_by": dict(bundle.manifest.created_by),
    }


def _device_memory() -> float | None:
    """MiB in use on the first GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _check_any(outcome: Outcome) -> None:
    if not outcome.contenders and outcome.is_interrupted:
        raise KeyboardInterrupt
    if not outcome.contenders:
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in outcome.not_measured)
        raise RequestError(f"no contender could be measured: {reasons}")
