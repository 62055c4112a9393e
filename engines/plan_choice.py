"""Which plans run a component on this machine: built of these very weights, by this library, for this GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ipa.engines.cuda_driver import Gpu
from ipa.engines.engine import GraphFile
from ipa.engines.errors import EngineError
from ipa.engines.machine import default_cache, platform_name
from ipa.engines.plan_cache import SUFFIX, PlanCache
from ipa.engines.plan_file import RECIPE, PlanError, PlanHeader, PlanKey, read_header, read_plan
from ipa.engines.signed_file import SignedFile

ANY_CAPABILITY = "8.0 and later"  # what TensorRT-RTX builds for by itself
_OLDEST_OF_ANY = (8, 0)


@dataclass(frozen=True)
class StoredPlan:
    """A plan that may run here.

    Attributes:
        header: what it is.
        load: reads it, and proves again that it is the one that was written.
        kernels: where to keep what is compiled when it first runs; `None` in a folder that is not the user's cache.
    """

    header: PlanHeader
    load: Callable[[], bytes]
    kernels: SignedFile | None


def gpu_target(gpu: Gpu) -> str:
    """The GPU that TensorRT builds on, as a plan's key names it."""
    return f"{gpu.capability} {gpu.name}"


def usable_plans(graph: GraphFile, engine: str, version: str, gpu: Gpu) -> list[StoredPlan]:
    """The plans for a component, newest first; those of `graph.plans` if the user named that folder.

    Args:
        graph: the component.
        engine: `tensorrt` or `tensorrt-rtx`.
        version: of its library.
        gpu: that is to run them.
    Raises:
        EngineError: there is none; says why, and the command that builds it.
    """
    found: list[tuple[int, StoredPlan]] = []
    refused: list[list[str]] = []
    for path, plan in _plans(graph.plans):
        header = plan.header
        if (header.key.component, header.key.engine) == (graph.component, engine):
            obstacles = _obstacles(header.key, graph, version, gpu)
            if obstacles:
                refused.append(obstacles)
            else:
                found.append((path.stat().st_mtime_ns, plan))
    if not found:
        nearest: list[str] = min(refused, key=len) if refused else ["none has been built"]
        where, option = (f"in {graph.plans}", f" --cache {graph.plans}") if graph.plans else ("in the cache", "")
        raise EngineError(
            f"{graph.component}: no engine for {engine} {where}: {'; '.join(nearest)}; "
            f"run `ipa-export build-engines --bundle {graph.bundle} --engine {engine}{option}`"
        )
    return [plan for _, plan in sorted(found, key=lambda pair: pair[0], reverse=True)]


def _plans(trusted: Path | None) -> Iterator[tuple[Path, StoredPlan]]:
    if trusted is None:
        cache = PlanCache(default_cache())
        for path, header in cache.headers():
            yield path, StoredPlan(header, partial(_from_cache, cache, header.key), cache.kernels(header.key))
        return
    if not trusted.is_dir():
        raise EngineError(f"--trust-engines {trusted} is not a folder; name one with *{SUFFIX} files")
    for path in sorted(trusted.glob(f"*{SUFFIX}")):
        try:
            yield path, StoredPlan(read_header(path, None), partial(_from_file, path), None)
        except (PlanError, OSError) as error:
            raise EngineError(f"--trust-engines: {path} is refused: {error}") from error


def _from_cache(cache: PlanCache, key: PlanKey) -> bytes:
    return cache.load(key)[1]


def _from_file(path: Path) -> bytes:
    return read_plan(path, None)[1]


def _obstacles(key: PlanKey, graph: GraphFile, version: str, gpu: Gpu) -> list[str]:
    """Why a plan cannot be used, for people."""
    pairs = (
        ("weights", key.weights, graph.sha256),
        ("version", key.version, version),
        ("platform", key.platform, platform_name()),
        ("recipe", key.recipe, RECIPE),
    )
    reasons = [
        f"{name} differ" if name == "weights" else f"{name} was {old}, is {new}"
        for name, old, new in pairs
        if old != new
    ]
    return reasons if _is_for(key, gpu) else [*reasons, f"it is for {key.target}, this GPU is {gpu_target(gpu)}"]


def _is_for(key: PlanKey, gpu: Gpu) -> bool:
    if key.engine == "tensorrt":
        return key.target == gpu_target(gpu)
    if key.target == ANY_CAPABILITY:
        major, minor = gpu.capability.split(".")
        return (int(major), int(minor)) >= _OLDEST_OF_ANY
    return gpu.capability in key.target.split(",")
