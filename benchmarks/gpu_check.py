"""Every engine that this machine can run, checked against PyTorch and timed against PyTorch eager: `make gpu-check`.

No network: the models are SD1.5's, at full size on a GPU and small elsewhere, with random weights from a seed. Engines
for NVIDIA GPUs are built first, where their library is installed. Without a GPU the rest runs all the same.

Timing: one step of the UNet with guidance and the image prompt, the contenders in turn, medians of the ratios within
each round. A PyTorch step is timed with its inputs on the device and waited for; an engine's from numpy to numpy.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import UNet2DConditionModel

from ipa.benchmarks.command import Command
from ipa.benchmarks.device_loop import device_loop
from ipa.benchmarks.engine_build import build_engine
from ipa.benchmarks.full_size import FULL, SMALL, Sizes, write_adapter, write_pipeline
from ipa.benchmarks.random_inputs import random_inputs
from ipa.benchmarks.rounds import interleave, ratio
from ipa.engines.bundle import Bundle
from ipa.engines.cuda_driver import Driver, find_driver
from ipa.engines.engine import Engine
from ipa.engines.registry import BACKENDS, ENGINE_NAMES, Backend
from ipa.engines.tensorrt_library import MODULES
from ipa.export.adapters import AdapterFile, read_adapter
from ipa.export.build import ExportRequest, export_bundle
from ipa.export.checks import Check
from ipa.export.dimensions import manifest_dimensions
from ipa.export.oracle import DiffusersStep
from ipa.export.quiet import quiet_libraries
from ipa.export.validate import Validator
from ipa.runtime.doctor import as_text, examine
from ipa.trainer.files import atomic_path

ADAPTER = "ip-adapter"
WARM_UP = 3  # calls before the rounds: kernels are chosen, graphs captured
TOKENS = 4


def say(text: str) -> None:
    """A line of the report, at once."""
    click.echo(text)


def prepare(folder: Path, sizes: Sizes) -> Path:
    """Models and the FP16 bundle, made once in `folder`; the bundle."""
    base, adapter, bundle = folder / "base", folder / f"{ADAPTER}.safetensors", folder / "bundle"
    if not adapter.exists():
        write_pipeline(base, sizes=sizes)
        with atomic_path(adapter) as partial:  # that it is there says that all of it is
            write_adapter(partial, sizes=sizes)
    if not bundle.exists():
        files = (AdapterFile(ADAPTER, adapter),)
        export_bundle(ExportRequest(str(base), bundle, adapters=files, dtype="float16", force=True))
    return bundle


def build(bundle: Path, engine: str, size: int) -> dict[str, Any]:
    """Build what the cache has not: one line of what it took, or why it failed."""
    try:
        built, kept, seconds = build_engine(Bundle.open(bundle), engine, f"{size}x{size}")
    except Exception as error:  # whatever one engine does, the others are looked at
        return {"build": f"FAILED: {error!r}", "passed": False}
    return {"build": f"{built} built in {seconds:.0f} s, {kept} kept"}


def obstacle(backend: Backend, bundle: Bundle) -> str:
    """Why a back-end cannot run here; empty where it can."""
    if not backend.is_installed:
        return f"not installed: {backend.install()}"
    return backend.obstacle([bundle.graph(name) for name in bundle.manifest.components])


def check(folder: Path, engine: str) -> dict[str, Any]:
    """Each component and whole runs against PyTorch in float32."""
    adapters = [AdapterFile(ADAPTER, folder / f"{ADAPTER}.safetensors")]
    checks: list[Check] = []
    try:
        for line in Validator(folder / "bundle", str(folder / "base"), None, adapters, engine).run():
            say(f"    {line}")
            checks.append(line)
    except Exception as error:  # as above
        say(f"    FAILED: {error!r}")
        return {"passed": False, "error": repr(error), "checks": [asdict(line) for line in checks]}
    return {"passed": all(line.passed for line in checks), "checks": [asdict(line) for line in checks]}


def own_loop(bundle: Bundle, engine: str, side: int, rounds: int) -> dict[str, Any]:
    """The loop with latents on the device, of engines that have one, against the loop on the host."""
    try:
        found = device_loop(bundle, engine, side, TOKENS, rounds)
    except Exception as error:  # as above
        say(f"    device loop FAILED: {error!r}")
        return {"passed": False, "device_loop": {"error": repr(error)}}
    if found is None:
        return {}
    times = ", ".join(f"{name} {value:.2f} ms" for name, value in found["milliseconds_a_step"].items())
    verdict = "ok  " if found["passed"] else "FAIL"
    say(f"    {verdict} device loop: relative error {found['relative_error']:.1e} from the host's; a step: {times}")
    return {"passed": found["passed"], "device_loop": found}


class Eager:
    """A step of diffusers' UNet with its own IP-Adapter, on the GPU in FP16 or on the CPU in FP32."""

    def __init__(self, folder: Path, bundle: Bundle, batch: int, side: int, is_compiled: bool) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float16 if self._device == "cuda" else torch.float32
        unet = UNet2DConditionModel.from_pretrained(folder / "base", subfolder="unet").eval()
        manifest = bundle.manifest
        dimensions = manifest_dimensions(manifest)
        DiffusersStep(unet, read_adapter(folder / f"{ADAPTER}.safetensors", manifest.kv_layout, dimensions))
        unet = unet.to(self._device, dtype, memory_format=torch.channels_last)
        self._unet: Any = torch.compile(unet) if is_compiled else unet
        make = partial(torch.randn, device=self._device, dtype=dtype)
        self._sample = make(batch, dimensions.unet_in_channels, side, side)
        text = make(batch, dimensions.text_tokens, dimensions.text_width)
        self._condition = (text, [make(batch, 1, TOKENS, dimensions.text_width)])
        self.name = (
            f"torch_{'compile' if is_compiled else 'eager'} ({self._device}, {str(dtype).removeprefix('torch.')})"
        )

    @torch.inference_mode()
    def __call__(self) -> None:
        """One step, waited for."""
        self._unet(self._sample, 500, self._condition, return_dict=False)
        if self._device == "cuda":
            torch.cuda.synchronize()


def speed(
    folder: Path, bundle: Bundle, engines: list[str], batch: int, side: int, rounds: int, is_compiled: bool
) -> dict[str, Any]:
    """Seconds of a step by contender, and the ratio to PyTorch eager."""
    contenders: dict[str, Callable[[], object]] = {}
    opened: dict[str, Engine] = {}
    free = {"batch": batch, "latent_height": side, "latent_width": side, "tokens": TOKENS}
    with ExitStack() as stack:
        eager = Eager(folder, bundle, batch, side, False)
        contenders[eager.name] = eager
        if is_compiled:
            compiled = Eager(folder, bundle, batch, side, True)
            contenders[compiled.name] = compiled
        for name in engines:
            engine = stack.enter_context(bundle.open_component("unet", name))
            inputs = random_inputs(engine.spec, free, np.random.default_rng(0))
            for input_name, array in inputs.items():  # as in a run
                array.flags.writeable = input_name in ("sample", "timestep")
            contenders[name] = partial(engine, **inputs)
            opened[name] = engine
        for contender in contenders.values():
            for _ in range(WARM_UP):
                contender()
        seconds = interleave(contenders, rounds)
        captured = {name: getattr(engine, "is_captured", False) for name, engine in opened.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: ratio(seconds[eager.name], values) for name, values in seconds.items()}
    say(f"\nUNet batch {batch}, {8 * side}x{8 * side}:\n| | step/s | ms | x eager |\n|---|---|---|---|")
    for name, value in medians.items():
        say(f"| {name} | {1 / value:.2f} | {1e3 * value:.2f} | {ratios[name]['median']:.2f} |")
    return {
        "unet_batch": batch,
        "pixels": 8 * side,
        "seconds_median": medians,
        "speedup_over_torch_eager": ratios,
        "is_cuda_graph": captured,
    }


@click.command("gpu_check", cls=Command)
@click.option("--model", type=click.Choice(["sd15", "small"]), help="[default: sd15 with a GPU, else small]")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("out/gpu-check"), help="For models and bundle.")
@click.option("--engine", "wanted", multiple=True, type=click.Choice(list(ENGINE_NAMES[1:])), help="[default: all]")
@click.option("--batch", "batches", multiple=True, default=[2, 8], help="UNet batch: 2 is one picture with guidance.")
@click.option("--rounds", default=7, show_default=True, help="Counted rounds.")
@click.option("--compile", "is_compiled", is_flag=True, help="Time torch.compile, too.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("out"), help="Folder for the record.")
def main(
    model: str | None,
    folder: Path,
    wanted: tuple[str, ...],
    batches: tuple[int, ...],
    rounds: int,
    is_compiled: bool,
    output: Path,
) -> None:
    """Check and time every engine; the record goes to OUTPUT/gpu_check.json. Exit code 1: one differs from PyTorch."""
    quiet_libraries()
    report, driver = examine(), find_driver()
    say(as_text(report))
    model = model or ("sd15" if isinstance(driver, Driver) else "small")
    folder = folder / model
    bundle = Bundle.open(prepare(folder, FULL if model == "sd15" else SMALL))
    size = bundle.manifest.defaults.height
    record: dict[str, Any] = {
        "command": "python -m ipa.benchmarks.gpu_check " + " ".join(sys.argv[1:]),
        "model": f"SD1.5 {'at full size' if model == 'sd15' else 'structure, small'}, FP16 bundle, random weights",
        "machine": {"system": report.system, "cores": report.cores, "driver": asdict(report.driver)},
        "versions": {name: version(name) for name in ("ipa-runtime", "torch", "diffusers")},
        "engines": {},
        "speed": [],
    }
    states = record["engines"]
    builders = [name for name in MODULES if name != "tensorrt" or isinstance(driver, Driver)]  # it builds on the GPU
    for backend in BACKENDS:
        if wanted and backend.name not in wanted:
            continue
        state: dict[str, Any] = {}
        states[backend.name] = state
        if backend.name in builders and backend.is_installed:
            state |= build(bundle.root, backend.name, size)
        state["obstacle"] = obstacle(backend, bundle)
        say(f"\n{backend.name}: {state.get('build', '')} {state['obstacle'] or 'runs'}")
        if not state["obstacle"]:
            state |= {"version": backend.version, **check(folder, backend.name)}
        if state.get("passed"):
            state |= own_loop(bundle, backend.name, size // 8, rounds)
        write(record, output)
    ready = [name for name, state in states.items() if state.get("passed")]
    for batch in batches:
        try:
            record["speed"].append(speed(folder, bundle, ready, batch, size // 8, rounds, is_compiled))
        except Exception as error:  # the next batch may fit
            say(f"UNet batch {batch}: FAILED: {error!r}")
            record["speed"].append({"unet_batch": batch, "error": repr(error)})
        write(record, output)
    failed = [name for name, state in states.items() if state.get("passed") is False]
    failed += [f"batch {times['unet_batch']}" for times in record["speed"] if "error" in times]
    if failed:
        raise click.ClickException(f"differs from PyTorch, or failed: {', '.join(failed)}; see above")


def write(record: dict[str, Any], folder: Path) -> None:
    """The record so far: whatever comes next, it is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "gpu_check.json") as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
