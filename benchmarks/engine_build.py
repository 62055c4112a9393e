"""Engines for NVIDIA GPUs, built before they are measured."""

from __future__ import annotations

import time

from ipa.engines.bundle import Bundle
from ipa.engines.machine import default_cache
from ipa.engines.plan_cache import PlanCache
from ipa.engines.shape_profile import ShapeProfile
from ipa.export.engine_builds import EngineBuilds

LEAST_BATCH = 4  # pictures that an engine takes at least: one is built for several runs


def build_engine(bundle: Bundle, engine: str, resolution: str, batch: int = 1) -> tuple[int, int, float]:
    """Build what the user's cache has not.

    Args:
        engine: `tensorrt` or `tensorrt-rtx`.
        resolution: `WIDTHxHEIGHT`.
        batch: pictures a call, which the engine is tuned for.
    Returns:
        How many plans were built, how many kept, and the seconds.
    """
    profile = ShapeProfile.parse([resolution, "64x64"], f"1:{batch}:{max(LEAST_BATCH, batch)}", "1:4:16")
    builds = EngineBuilds(bundle, PlanCache(default_cache()), engine, profile)
    kept, jobs = builds.survey()
    start = time.perf_counter()
    builds.run(jobs)
    return len(jobs), len(kept), time.perf_counter() - start
