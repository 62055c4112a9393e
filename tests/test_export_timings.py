"""What TensorRT measured in one build is there for the next. It builds on a GPU alone: a stand-in takes its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ipa.engines.bundle import Bundle
from ipa.engines.plan_cache import PlanCache
from ipa.engines.shape_profile import ShapeProfile
from ipa.export.build_child import _take_timings
from ipa.export.engine_builds import EngineBuilds


class Config:
    """TensorRT's builder configuration: timings are taken only if they are of this library and GPU."""

    def create_timing_cache(self, stored: bytes) -> bytes | None:
        return None if stored == b"garbage" else stored

    def set_timing_cache(self, cache: bytes, ignores_mismatch: bool) -> bool:
        if ignores_mismatch or cache == b"another GPU":
            return False
        self.taken = cache
        return True


@pytest.mark.parametrize(
    ("stored", "taken"), [(b"this GPU", b"this GPU"), (b"another GPU", b""), (b"garbage", b""), (None, b"")]
)
def test_timings_are_taken_where_they_fit(stored: bytes | None, taken: bytes, tmp_path: Path) -> None:
    if stored is not None:
        (tmp_path / "timings").write_bytes(stored)
    config = Config()
    _take_timings(config, tmp_path / "timings")
    assert config.taken == taken


def test_each_build_begins_with_what_is_known(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = ShapeProfile.parse(["128x128"], "1:1:2", "4:4:4")
    builds = EngineBuilds(Bundle.open(tiny_bundle), PlanCache(tmp_path / "cache"), "tensorrt-rtx", profile)
    builds._engine, known = "tensorrt", []

    def child(component: str, spec: Any, task: dict[str, Any], folder: Path, percent: Any) -> dict[str, Any]:
        timings = Path(task["timings"])
        known.append(timings.read_bytes() if timings.exists() else None)
        timings.write_bytes(component.encode())
        Path(task["plan"]).write_bytes(b"plan")
        return {"tensors": {}, "seconds": 1.0, "peak_mib": 1.0}

    monkeypatch.setattr(builds, "_run_child", child)
    _, jobs = builds.survey()
    builds.run(jobs[:3])
    assert known == [None, *(job.component.encode() for job in jobs[:2])]
    (file,) = (tmp_path / "cache").glob("*.timings")
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    builds.run(jobs[:1])
    assert known[-1] is None, "changed by somebody else"
