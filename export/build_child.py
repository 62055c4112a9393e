"""The process that builds one engine: `python -m ipa.export.build_child TASK.json`.

The native builder may crash, or need more memory than there is: that ends this process and no other. Progress and
result go to the pipe given by number, one JSON object a line; what libraries print goes to stderr.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import onnx

from ipa.engines.tensorrt_library import load_library, logger
from ipa.export.attention_function import expanded

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64"}


@dataclass(frozen=True)
class BuildTask:
    """One engine to build.

    Attributes:
        engine: `tensorrt` or `tensorrt-rtx`.
        graph: the component's `model.onnx`.
        shapes: smallest, usual and largest shape of each input with a free axis.
        capabilities: compute capabilities such as `8.6`; none: the library's own choice.
        plan: file to write.
        timings: file that TensorRT's timings of kernels are read from, if it is there, and written to; empty: none,
            as TensorRT-RTX times nothing.
        pipe: number of the open file to report to.
    """

    engine: str
    graph: str
    shapes: dict[str, list[list[int]]]
    capabilities: list[str]
    plan: str
    timings: str
    pipe: int

    def to_json(self) -> str:
        """The task as text."""
        return json.dumps(asdict(self))


@dataclass
class _Phase:
    """One of the nested parts that the builder tells of."""

    parent: str | None
    steps: int
    done: int = 0


class BuildError(Exception):
    """The library refused the graph or gave no engine; the message says which."""


def build(task: BuildTask, report: TextIO) -> None:
    """Parse, build, write the plan, tell what came out."""
    start = time.perf_counter()
    trt = load_library(task.engine)
    log = logger(task.engine)
    log.prints = True  # for the parent, which collects it
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, log, Path(task.graph))
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(trt, report)
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: float32 would have 10 bits in place of 23
    if task.timings:
        _take_timings(config, Path(task.timings))
    for index, capability in enumerate(task.capabilities):
        config.num_compute_capabilities = len(task.capabilities)
        config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + capability.replace(".", "")), index)
    profile = builder.create_optimization_profile()
    for name, shapes in task.shapes.items():
        profile.set_shape(name, *shapes)
    if task.shapes and config.add_optimization_profile(profile) < 0:
        raise BuildError("the library refused the shapes of the profile")
    print(json.dumps({"tensors": _tensors(network, profile, task)}), file=report, flush=True)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError("the builder gave no engine; its messages are above")
    Path(task.plan).write_bytes(plan)
    if task.timings:
        Path(task.timings).write_bytes(config.get_timing_cache().serialize())
    result = {"seconds": time.perf_counter() - start, "peak_mib": _peak_mib()}
    print(json.dumps(result), file=report, flush=True)


def _take_timings(config: Any, file: Path) -> None:
    """Kernels that were timed before are not timed again; the library refuses timings of another GPU or version."""
    stored = file.read_bytes() if file.exists() else b""
    cache = config.create_timing_cache(stored)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _peak_mib() -> float:
    """The most memory that this process had; `getrusage` would count what its parent had when it started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _parse(trt: Any, network: Any, logger: Any, path: Path) -> None:
    """The graph without its attention nodes, whose definition the library mixes up; weights stay in their file."""
    model = expanded(onnx.load(path, load_external_data=False))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString(), os.fspath(path)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise BuildError("the parser refused the graph: " + "; ".join(error.desc() for error in errors))


def _tensors(network: Any, profile: Any, task: BuildTask) -> dict[str, dict[str, Any]]:
    """Inputs and outputs of the network, inputs with the shapes of the profile.

    The engine itself can be asked only where a GPU is.
    """
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    tensors += [network.get_output(index) for index in range(network.num_outputs)]
    return {
        tensor.name: {
            "dtype": _DTYPES[tensor.dtype.name],
            "axes": list(tensor.shape),
            "shapes": [list(shape) for shape in profile.get_shape(tensor.name)] if tensor.name in task.shapes else [],
        }
        for tensor in tensors
    }


def _monitor(trt: Any, report: TextIO) -> Any:
    """Tells the part that is done, from nested phases that each have a number of steps."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.phases: dict[str, _Phase] = {}
            self.told = 0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = _Phase(parent_phase, max(num_steps, 1))

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.phases:
                self.phases[phase_name].done = step + 1
            percent = int(100 * self.part(None))
            if percent > self.told:
                self.told = percent
                print(json.dumps({"percent": percent}), file=report, flush=True)
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def part(self, parent: str | None) -> float:
            """How much of the phases below `parent` is done, 0 to 1."""
            inner = {name: phase for name, phase in self.phases.items() if phase.parent == parent}
            return min(1.0, sum((phase.done + self.part(name)) / phase.steps for name, phase in inner.items()))

    return Monitor()


def _end_with_parent() -> None:
    """A build that nobody waits for ends, too."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Build what the task file says; exit code 1 and a last line on stderr where that fails."""
    _end_with_parent()
    task = BuildTask(**json.loads(Path(sys.argv[1]).read_text("utf-8")))
    with os.fdopen(task.pipe, "w") as report:
        try:
            build(task, report)
        except BuildError as error:
            print(error, file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
