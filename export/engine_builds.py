"""Engines for a bundle: what the cache holds already is kept, the rest is built, one process for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO, Any

from ipa.engines.bundle import Bundle, verify_files
from ipa.engines.cuda_driver import Driver, find_driver
from ipa.engines.errors import EngineError
from ipa.engines.machine import platform_name
from ipa.engines.manifest import ComponentRecord
from ipa.engines.plan_cache import Missing, PlanCache
from ipa.engines.plan_choice import ANY_CAPABILITY, gpu_target
from ipa.engines.plan_file import RECIPE, PlanHeader, PlanKey
from ipa.engines.shape_profile import ShapeProfile, as_text
from ipa.engines.spec import ComponentSpec
from ipa.engines.tensorrt_library import library_version, load_library
from ipa.export.build_child import BuildTask
from ipa.export.child_end import wait_for
from ipa.export.resources import Prediction, check_resources

CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # that TensorRT-RTX builds for without the GPU
_LAST_LINES = 3
Percent = Callable[[str, int], None]


@dataclass(frozen=True)
class Outcome:
    """What became of one component: its plan, and why it was built or kept."""

    component: str
    was_built: bool
    reason: str
    header: PlanHeader


@dataclass(frozen=True)
class Job:
    """One engine to build: of what, why, and what it will take."""

    component: str
    record: ComponentRecord
    reason: str
    prediction: Prediction


class EngineBuilds:
    """All engines of a bundle, for one library, profile and target."""

    def __init__(
        self, bundle: Bundle, cache: PlanCache, engine: str, profile: ShapeProfile, capabilities: tuple[str, ...] = ()
    ) -> None:
        """Say what is to be built.

        Args:
            bundle: opened; the files of what is built are hashed before.
            cache: where plans are kept.
            engine: `tensorrt`, which builds for this machine's GPU, or `tensorrt-rtx`, which needs none.
            profile: shapes to build for.
            capabilities: some of `CAPABILITIES`, for `tensorrt-rtx`; none: those that it chooses.
        Raises:
            EngineError: the library is missing or does not fit.
        """
        self._bundle, self._cache, self._engine, self._profile = bundle, cache, engine, profile
        self._version = library_version(engine)
        self._capabilities = capabilities
        self._target = target(engine, capabilities)
        self._children: set[subprocess.Popen[bytes]] = set()
        self._starting = Lock()
        self._is_stopped = False

    def components(self) -> dict[str, ComponentRecord]:
        """Everything of the bundle that becomes an engine."""
        return self._bundle.manifest.graphs()

    def key(self, component: str, record: ComponentRecord) -> PlanKey:
        """What the plan of a component depends on."""
        shapes = self._profile.shapes(component, record.spec, self._bundle.manifest.vae.downscale)
        return PlanKey(
            component=component,
            weights=record.sha256,
            precision=record.dtype,
            engine=self._engine,
            version=self._version,
            target=self._target,
            profile=as_text(shapes),
            platform=platform_name(),
            recipe=RECIPE,
        )

    def survey(self, force: bool = False) -> tuple[list[Outcome], list[Job]]:
        """What can be kept, and what must be built.

        Args:
            force: build what is there, too.
        """
        kept, jobs = [], []
        components = self.components()
        keys = [self.key(component, record) for component, record in components.items()]
        with ThreadPoolExecutor() as pool:  # whole plans are hashed
            headers = list(pool.map(lambda key: self._cache.find(key, self._bundle.root), keys))
        for (component, record), found in zip(components.items(), headers, strict=True):
            if isinstance(found, PlanHeader) and not force:
                kept.append(Outcome(component, False, "nothing has changed", found))
            else:
                reason = found.reason if isinstance(found, Missing) else "forced"
                jobs.append(Job(component, record, reason, Prediction.of(sum(file.size for file in record.files))))
        return kept, jobs

    def run(
        self, jobs: Sequence[Job], at_once: int = 1, percent: Percent = lambda component, done: None
    ) -> list[Outcome]:
        """Build.

        Args:
            jobs: some of those that `survey` gave.
            at_once: builds at the same time.
            percent: told how much of a component is done.
        Raises:
            EngineError: memory or disk cannot hold a build, or one failed; plans that were finished are kept.
        """
        check_resources({job.component: job.prediction for job in jobs}, self._cache.root, at_once)

        def build(job: Job) -> Outcome:
            header = self._build(job.component, job.record, lambda done: percent(job.component, done))
            return Outcome(job.component, True, job.reason, header)

        with ThreadPoolExecutor(at_once) as pool:
            futures = [pool.submit(build, job) for job in jobs]
            try:
                done, running = wait(futures, return_when=FIRST_EXCEPTION)
                if running:
                    next(future for future in done if future.exception()).result()
            except BaseException:  # Ctrl-C or a failed build: the others need not end
                pool.shutdown(wait=False, cancel_futures=True)
                self._stop()
                raise
            return [future.result() for future in futures]

    def _stop(self) -> None:
        """End what is being built, and start nothing more."""
        with self._starting:
            self._is_stopped = True
            for child in tuple(self._children):
                child.kill()

    def _build(self, component: str, record: ComponentRecord, percent: Callable[[int], None]) -> PlanHeader:
        """One engine, by a child process, into the cache."""
        percent(0)
        verify_files(self._bundle.root, record.files)
        shapes = self._profile.shapes(component, record.spec, self._bundle.manifest.vae.downscale)
        with self._cache.workspace() as folder:
            plan, timings = folder / "plan", folder / "timings"
            kept = self._cache.timings(self._engine, self._version, self._target)
            if (known := kept.read()) is not None:
                timings.write_bytes(known)
            ranges = {name: [list(shape) for shape in sizes] for name, sizes in shapes.items()}
            task = {
                "engine": self._engine,
                "graph": os.fspath(self._bundle.file(record.files[0]).resolve()),
                "shapes": ranges,
                "capabilities": list(self._capabilities),
                "plan": os.fspath(plan),
                "timings": "" if self._engine == "tensorrt-rtx" else os.fspath(timings),
            }
            result = self._run_child(component, record.spec, task, folder, percent)
            tensors = {name: _describe(tensor) for name, tensor in result["tensors"].items()}
            if timings.exists():
                with suppress(OSError):  # the next build is slower, and no more
                    kept.write(timings.read_bytes())
            percent(100)
            return self._cache.store(
                self.key(component, record), plan, self._bundle.root, tensors, result["seconds"], result["peak_mib"]
            )

    def _run_child(
        self,
        component: str,
        spec: ComponentSpec,
        task: Mapping[str, Any],
        folder: Path,
        percent: Callable[[int], None],
    ) -> dict[str, Any]:
        """Run the child to its end; what it prints ends up in the message if it fails."""
        reading, writing = os.pipe()
        file = folder / "task.json"
        file.write_text(BuildTask(**task, pipe=writing).to_json(), "utf-8")
        result: dict[str, Any] = {}
        with tempfile.TemporaryFile(dir=folder) as output, os.fdopen(reading) as reports:
            try:
                # -P: what lies in the current folder is not to be imported
                command = [sys.executable, "-P", "-m", "ipa.export.build_child", os.fspath(file)]
                child = self._start(command, writing, output)
            finally:
                os.close(writing)
            try:
                for report in _records(reports):
                    if "percent" in report:
                        percent(min(int(report["percent"]), 99))
                        continue
                    result |= report
                    if "tensors" in report:
                        _check_tensors(component, spec, report["tensors"])
                code, ending = wait_for(child)
            finally:
                child.kill()
                child.wait()
                self._children.discard(child)
            if code or "seconds" not in result:
                output.seek(0)
                lines = output.read().decode(errors="replace").strip().splitlines()[-_LAST_LINES:]
                said = " / ".join(lines) or "it printed nothing"
                raise EngineError(f"{component}: {self._engine} {self._version} {ending}; {said}")
        return result

    def _start(self, command: list[str], writing: int, output: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a child, unless all of them were stopped."""
        with self._starting:
            if self._is_stopped:
                raise EngineError("stopped")
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[writing],
                start_new_session=True,  # Ctrl-C is for us, who end it
            )
            self._children.add(child)
        return child


def target(engine: str, capabilities: tuple[str, ...]) -> str:
    """The GPUs that engines are built for, as text for a key.

    Raises:
        EngineError: the library cannot build for them, or not here.
    """
    load_library(engine)
    if engine == "tensorrt-rtx":
        unknown = [capability for capability in capabilities if capability not in CAPABILITIES]
        if unknown:
            raise EngineError(f"--compute-capability {unknown[0]} is none of {', '.join(CAPABILITIES)}")
        if len(set(capabilities)) < len(capabilities):
            raise EngineError(f"--compute-capability {','.join(capabilities)} names one twice")
        return ",".join(sorted(capabilities, key=CAPABILITIES.index)) or ANY_CAPABILITY
    driver = find_driver()
    if not isinstance(driver, Driver):
        raise EngineError(
            f"{driver.reason}: TensorRT builds on the GPU that its engines will run on; "
            "`--engine tensorrt-rtx` builds without one"
        )
    if capabilities:
        raise EngineError("--compute-capability is for --engine tensorrt-rtx; TensorRT builds for the GPU it runs on")
    return gpu_target(driver.gpus[0])


def _records(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The child's reports; a line that a crash has cut off is no report."""
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return


def _check_tensors(component: str, spec: ComponentSpec, found: Mapping[str, Mapping[str, Any]]) -> None:
    """The network has the tensors of the spec table, with their types."""
    for tensor in (*spec.inputs, *spec.outputs):
        actual = found.get(tensor.name)
        axes = [axis if isinstance(axis, int) else -1 for axis in tensor.axes]
        if actual is None or actual["dtype"] != tensor.dtype or actual["axes"] != axes:
            raise EngineError(f"{component}: the network has {actual} for {tensor.name}, the bundle says {tensor}")


def _describe(tensor: Mapping[str, Any]) -> str:
    shapes = tensor["shapes"] or [["?" if axis < 0 else axis for axis in tensor["axes"]]]
    return f"{tensor['dtype']} {':'.join('x'.join(map(str, shape)) for shape in shapes)}"
