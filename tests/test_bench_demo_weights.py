"""The demo's weights as PyTorch, and the quality of the demo measured with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ipa.benchmarks.cli import main
from ipa.benchmarks.demo_weights import Places, restored_demo
from ipa.benchmarks.records import QualityRecord, read_record
from ipa.engines.bundle import Bundle
from ipa.engines.errors import IpaError
from ipa.runtime.demo import demo_bundle


def test_the_demo_by_pytorch_draws_what_the_bundle_draws(tmp_path: Path) -> None:
    command = ["quality", "--output", str(tmp_path), "--limit", "4", "--samples", "1", "--steps", "4"]
    result = CliRunner().invoke(main, [*command, "--engine", "onnxruntime"])
    assert result.exit_code == 0, result.output
    found = read_record(tmp_path / "quality.json")
    assert isinstance(found, QualityRecord)
    assert [arm.name for arm in found.arms] == ["engine", "torch-eager", "base"]
    assert found.differences[0].lowest_psnr > 30  # the bundle computes in half precision, PyTorch does not
    engine, theirs, base = found.arms
    assert engine.clip_i.value == pytest.approx(theirs.clip_i.value, abs=0.02)
    assert engine.clip_i.value > base.clip_i.value  # it shows what the adapter does
    assert engine.clip_t is None and "CLIP-T" in [row.name for row in found.not_measured]
    assert list(engine.rates) == ["foreground colour", "background colour", "both colours", "texture", "shape"]
    assert engine.rates["both colours"].value > base.rates["both colours"].value
    # What was made is kept.
    pipeline, adapter = restored_demo(Bundle.open(demo_bundle()), tmp_path / "models" / "demo")
    before = {file: file.stat().st_mtime_ns for file in [adapter, *pipeline.rglob("*")]}
    restored_demo(Bundle.open(demo_bundle()), tmp_path / "models" / "demo")
    assert before == {file: file.stat().st_mtime_ns for file in [adapter, *pipeline.rglob("*")]}


def test_weights_are_found_whole_turned_and_packed() -> None:
    rng = np.random.default_rng(0)

    def tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
        shapes = {"kernel": (4, 3, 2, 2), "bias": (5,), "turned": (6, 4), "k": (3, 4), "v": (2, 4)}
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    def graph(held: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
        packed = np.concatenate([held["k"], held["v"]]).T
        return [("kernel", held["kernel"]), ("bias", held["bias"]), ("onnx::1", held["turned"].T), ("onnx::2", packed)]

    random, shipped = tensors(rng), tensors(rng)
    places = Places()
    renamed = [(f"model.{name}" if name == "bias" else name, array) for name, array in graph(shipped)]
    places.add("unet", graph(random), renamed)
    for name, array in random.items():
        assert np.array_equal(places.find(name, array), shipped[name]), name
    with pytest.raises(IpaError, match=r"the weight other \(5,\) is not to be found"):
        places.find("other", rng.normal(size=5).astype(np.float32))
    for other in (graph(shipped)[:-1], [("else", array) for _, array in graph(shipped)]):
        with pytest.raises(IpaError, match=r"unet of the bundle has .* where the networks of"):
            places.add("unet", graph(random), other)
