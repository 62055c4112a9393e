"""`ipa-doctor`: which engines this machine can run, what is missing, and the one command that installs it."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import click

from ipa.engines.cuda_driver import Driver, NoDriver, find_driver
from ipa.engines.errors import EngineError, first_line
from ipa.engines.machine import available_cores, available_memory, default_cache, has_distribution
from ipa.engines.registry import BACKENDS, ONNXRUNTIMES, Backend, resolve_engine
from ipa.engines.tensorrt_library import MODULES, install_command, load_library

_GIB = 2**30


@dataclass(frozen=True)
class EngineState:
    """One engine here.

    Attributes:
        name: as `--engine` takes it.
        state: `ready`, `builds` (engines can be built, not run), `missing` or `broken`.
        detail: version, or what is in the way.
        install: the command that would help; empty where none does.
    """

    name: str
    state: str
    detail: str
    install: str = ""


@dataclass(frozen=True)
class Plans:
    """Engines in the cache.

    Attributes:
        folder: of the cache.
        count, size: how many, and their bytes.
        problem: why the cache cannot be used; empty where it can.
    """

    folder: str
    count: int = 0
    size: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Report:
    """What the doctor found; memory and disk in bytes, `None` where the system does not say."""

    ipa_runtime: str
    python: str
    system: str
    cores: int
    bfloat16: bool | None
    memory: int | None
    disk: int
    driver: Driver | NoDriver
    engines: tuple[EngineState, ...]
    auto: str
    plans: Plans
    advice: tuple[str, ...]


def examine() -> Report:
    """Look at everything; nothing here raises for what it finds."""
    driver, folder = find_driver(), default_cache()
    engines, plans = tuple(_state(backend, driver) for backend in BACKENDS), _plans(folder)
    try:
        auto = str(resolve_engine("auto"))
    except EngineError as error:
        auto = str(error)
    return Report(
        ipa_runtime=version("ipa-runtime"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cores=available_cores(),
        bfloat16=_has_bfloat16(),
        memory=available_memory(),
        disk=shutil.disk_usage(_existing(folder)).free,
        driver=driver,
        engines=engines,
        auto=auto,
        plans=plans,
        advice=tuple(_advice(engines, isinstance(driver, Driver), plans.count)),
    )


def _state(backend: Backend, driver: Driver | NoDriver) -> EngineState:
    """What one back-end can do here."""
    if not backend.is_installed:
        # Which TensorRT to install is the driver's affair.
        install = install_command(backend.name, driver) if backend.name in MODULES else backend.install()
        return EngineState(backend.name, "missing", backend.summary, install)
    try:
        for module in backend.modules:
            import_module(module)
        if backend.name in MODULES:
            load_library(backend.name)  # refuses one that is too old
    except Exception as error:  # a broken installation may raise anything
        return EngineState(backend.name, "broken", first_line(error), backend.install())
    detail = f"{backend.version}; {backend.summary}"
    if not backend.needs_gpu:
        return EngineState(backend.name, "ready", detail)
    if isinstance(driver, NoDriver):
        is_builder = backend.name == "tensorrt-rtx"
        return EngineState(backend.name, "builds" if is_builder else "broken", f"{detail}; {driver.reason}")
    if backend.name in MODULES:
        reason = backend.doubt()
        return EngineState(backend.name, "builds" if reason else "ready", f"{detail}; {reason}" if reason else detail)
    reason = backend.obstacle(())
    return EngineState(backend.name, "broken" if reason else "ready", f"{detail}; {reason}" if reason else detail)


def _has_bfloat16() -> bool | None:
    """Whether the processor computes in bfloat16; `None` where nothing here can tell."""
    try:
        from ipa.engines.openvino_engine import has_bfloat16

        return has_bfloat16()
    except Exception:  # missing, or a broken installation
        return None


def _plans(folder: Path) -> Plans:
    if not folder.exists():
        return Plans(str(folder))
    try:
        from ipa.engines.plan_cache import PlanCache

        headers = [header for _, header in PlanCache(folder).headers()]
    except (EngineError, ImportError) as error:  # it needs a Unix
        return Plans(str(folder), problem=str(error))
    return Plans(str(folder), len(headers), sum(header.size for header in headers))


def _advice(engines: tuple[EngineState, ...], has_gpu: bool, plan_count: int) -> Iterator[str]:
    """What to do, most useful first."""
    rivals = [name for name in ONNXRUNTIMES if has_distribution(name)]
    if len(rivals) > 1:
        names = " ".join(rivals)
        yield f"these overwrite each other's files: {names}; `pip uninstall {names}`, then install one of them"
    for state in engines:
        if state.state == "broken" and state.install:
            yield f"{state.name} does not load: `{state.install}`"
    if not has_gpu:
        best = next(state for state, backend in zip(engines, BACKENDS, strict=True) if not backend.needs_gpu)
        if best.state == "missing":
            yield f"faster pictures: `{best.install}`"
        return
    builders = [state for state in engines if state.name in MODULES]
    ready = [state.name for state in builders if state.state == "ready"]
    if not ready:
        yield f"faster pictures: `{builders[0].install}`"
    elif not plan_count:
        yield f"faster pictures: `ipa-export build-engines --bundle DIR --engine {ready[0]}`"


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def as_text(report: Report) -> str:
    """A page to read."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    bfloat16 = {True: ", bfloat16", False: ", no bfloat16", None: ""}[report.bfloat16]
    memory = "" if report.memory is None else f", {report.memory / _GIB:.1f} GiB of memory available"
    yield f"ipa-runtime {report.ipa_runtime}, Python {report.python}, {report.system}"
    yield f"processor: {report.cores} cores{bfloat16}{memory}"
    if isinstance(report.driver, NoDriver):
        yield f"GPU: {report.driver.reason}"
    else:
        for gpu in report.driver.gpus:
            cuda = ".".join(map(str, report.driver.cuda))
            yield f"GPU: {gpu.name}, compute capability {gpu.capability}, {gpu.memory / _GIB:.0f} GiB, CUDA {cuda}"
    yield ""
    for state in report.engines:
        install = f": `{state.install}`" if state.install else ""
        yield f"{state.name:16} {state.state:8} {state.detail}{install}"
    yield ""
    yield f"--engine auto: {report.auto}"
    plans = report.plans
    held = plans.problem or f"{plans.count} engines, {plans.size / 2**20:.1f} MiB"
    yield f"engine cache {plans.folder}: {held}; {report.disk / _GIB:.1f} GiB of disk are free"
    yield from (f"advice: {line}" for line in report.advice or ("nothing is missing",))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ipa-runtime")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def main(form: str) -> None:
    """Say which engines this machine can run, and what is missing. Exit code 1: none can run."""
    report = examine()
    click.echo(json.dumps(asdict(report), indent=1) if form == "json" else as_text(report))
    if not any(state.state == "ready" for state in report.engines):
        sys.exit(1)
