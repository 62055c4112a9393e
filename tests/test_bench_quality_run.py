"""Whole runs of `ipa-bench quality` on tiny models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics.image.fid
from PIL import Image, ImageOps
from quality_calls import SMALL, bench_quality
from tiny_eyes import Extractor, stand_in_for_inception

from ipa.benchmarks import quality_arms, quality_lpips, quality_measure, quality_models
from ipa.benchmarks.diffusers_pipeline import DiffusersPipeline
from ipa.benchmarks.quality_metrics import psnr
from ipa.benchmarks.records import QualityRecord, read_record
from ipa.engines.bundle import hash_file
from ipa.runtime.image_files import open_image
from ipa.runtime.pipeline import Pipeline


def record(output: Path) -> QualityRecord:
    found = read_record(output / "quality.json")
    assert isinstance(found, QualityRecord)
    return found


def figures(output: Path) -> QualityRecord:
    """Without what differs from run to run."""
    found = record(output)
    arms = [replace(arm, seconds_per_image=0.0) for arm in found.arms]
    return replace(found, origin=replace(found.origin, command="", created=""), arms=arms)


def all_options(bundle: Path, base: Path, adapter: Path, eyes: dict[str, Path]) -> tuple[list[object], list[object]]:
    """Every arm; every model that looks at pictures but Inception."""
    options = ["--bundle", bundle, "--base", base, "--adapter", adapter, "--sweep", "1,0", *SMALL]
    looks = ["--data", eyes["data"], "--clip", eyes["clip"], "--dino", eyes["dino"], "--lpips", eyes["lpips"]]
    return [*options, "--samples", 2], looks


def test_engine_pytorch_and_base(
    tiny_bundle: Path,
    tiny_base: Path,
    tiny_adapter_file: Path,
    eyes: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options, more = all_options(tiny_bundle, tiny_base, tiny_adapter_file, eyes)
    monkeypatch.setattr(quality_measure, "inception_obstacle", lambda: "")
    more += ["--inception", stand_in_for_inception(monkeypatch, tmp_path)]
    result = bench_quality(tmp_path, *options, *more)
    assert result.exit_code == 0, result.output
    found = record(tmp_path)
    engine, theirs, base = found.arms
    assert [arm.name for arm in found.arms] == ["engine", "torch-eager", "base"]
    (difference,) = found.differences
    # float32 on both sides: neighbours in rounding at most
    assert difference.lowest_psnr is None or difference.lowest_psnr > 45
    assert (difference.lowest_psnr is None) == (difference.psnr is None) == (difference.equal.value == 1)
    gaps = {(gap.second, gap.measure): gap.value for gap in found.gaps}
    assert set(gaps) == {(arm, name) for arm in ("base", "torch-eager") for name in ("clip_i", "clip_t", "dino")}
    for name in ("clip_i", "clip_t", "dino"):
        ours = getattr(engine, name)
        assert ours.value == pytest.approx(getattr(theirs, name).value, abs=2e-3)
        for arm in (theirs, base):  # the mean of differences is the difference of means, its interval is its own
            assert gaps[arm.name, name].value == pytest.approx(ours.value - getattr(arm, name).value, abs=1e-12)
            assert gaps[arm.name, name].count == 3
        assert ours.value != getattr(base, name).value and ours.low <= ours.value <= ours.high and ours.count == 3
    assert found.setting["images"] == 3 and found.setting["samples"] == 2 and found.setting["scheduler"] == "pndm"
    # Scale 0 is the base model. Its one sample is the first of two by the same seed.
    for number in (10, 11, 12):
        zero, without = (tmp_path / "pictures" / part / f"{number:012}" for part in ("sweep/0", "base"))
        assert psnr(zero.with_suffix(".png"), without.with_name(f"{number:012}-0.png")) > 45
    assert found.sweep is not None and found.sweep.scales == [0, 1] and found.sweep.clip_i[0] != found.sweep.clip_i[1]
    assert (found.sweep.images, found.sweep.samples, found.sweep.clip_i[0].count) == (3, 1, 3)
    assert "scale sweep, the first 3 image prompts, pictures of each: 1" in result.output
    assert Image.open(tmp_path / "sheet.png").size == (110 + 4 * 134, 22 + 3 * 134)
    assert Image.open(tmp_path / found.sweep.sheet).size == (110 + 3 * 134, 22 + 3 * 134)
    assert found.not_measured == []
    setting = found.setting
    assert setting["engine_version"] == version("onnxruntime") and setting["engine_dtype"] == "float32"
    assert setting["torch"] == "cpu float32" or torch.cuda.is_available()
    assert (setting["base"], setting["adapter"]) == (str(tiny_base), str(tiny_adapter_file))
    sums = {"adapter_sha256": tiny_adapter_file, "lpips_sha256": eyes["lpips"]}
    sums["inception_sha256"] = Path(str(more[-1]))
    assert {name: setting[name] for name in sums} == {name: hash_file(file) for name, file in sums.items()}
    assert len({setting[name] for name in ("base_sha256", "clip_sha256", "dino_sha256", "unet_files_sha256")}) == 4
    assert difference.lpips is not None and 0 <= difference.lpips.value < 1e-3
    metric = torchmetrics.image.fid.FrechetInceptionDistance(Extractor())
    for number in (10, 11, 12):
        image = open_image(eyes["data"] / "val2017" / f"{number:012}.jpg")
        metric.update(as_batch(ImageOps.fit(image, (64, 64), Image.Resampling.BICUBIC)), real=True)
        for sample in (0, 1):
            metric.update(as_batch(Image.open(tmp_path / "pictures/engine" / f"{number:012}-{sample}.png")), real=False)
    assert engine.fid is not None and engine.fid.value == pytest.approx(float(metric.compute()), rel=1e-3)
    assert found.setting["fid_pictures"] == {"data": 3, "drawn": 6} and "299 x 299" in result.output
    value = engine.clip_t.value if engine.clip_t else 0
    assert f"x 2.5 as in the paper {2.5 * value:.3f}, x 100 as torchmetrics {100 * value:.2f}" in result.output


def as_batch(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def failing(calls: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """`real` that is interrupted after so many calls."""
    left = iter(range(calls))

    def call(*given: Any, **named: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*given, **named)

    return call


def test_a_run_that_was_stopped_goes_on_to_the_same_figures(
    tiny_bundle: Path,
    tiny_base: Path,
    tiny_adapter_file: Path,
    eyes: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = [*chain(*all_options(tiny_bundle, tiny_base, tiny_adapter_file, eyes)), "--limit", 2]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert bench_quality(whole, *options).exit_code == 0
    stops: list[tuple[type, str, int]] = [
        (DiffusersPipeline, "draw", 1),
        (Pipeline, "run", 3),  # without image prompt
        (quality_models.Clip, "image", 4),
        (quality_models.Dino, "image", 4),
        (quality_lpips.Lpips, "__call__", 3),
        (Pipeline, "run", 1),  # in the sweep
    ]
    for cls, name, calls in stops:
        with monkeypatch.context() as patch:
            patch.setattr(cls, name, failing(calls, getattr(cls, name)))
            result = bench_quality(parts, *options)
        assert (result.exit_code, result.output) == (130, "ipa-bench: stopped; the same command goes on from here\n")
        assert not list(parts.rglob(".*"))
    assert bench_quality(parts, *options).exit_code == 0
    assert figures(parts) == figures(whole)
    drawn = sorted(file.relative_to(whole) for file in (whole / "pictures").rglob("*.png"))
    assert len(drawn) == 3 * 2 * 2 + 2 * 2
    for name in drawn:
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    # All is there now: nothing is loaded or drawn, nothing is looked at.
    monkeypatch.setattr(Pipeline, "run", failing(0, Pipeline.run))
    monkeypatch.setattr(DiffusersPipeline, "__init__", failing(0, DiffusersPipeline.__init__))
    for cls in (quality_models.Clip, quality_models.Dino):
        monkeypatch.setattr(cls, "image", failing(0, cls.image))
    assert bench_quality(parts, *options).exit_code == 0
    assert figures(parts) == figures(whole)


def test_pictures_of_other_settings_are_refused_or_drawn_anew(
    tiny_bundle: Path,
    tiny_base: Path,
    tiny_adapter_file: Path,
    eyes: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["--bundle", tiny_bundle, "--data", eyes["data"], "--clip", eyes["clip"], "--samples", 1, *SMALL]
    assert bench_quality(tmp_path, *options, "--limit", 2).exit_code == 0

    def refused(*more: object) -> str:
        result = bench_quality(tmp_path, *options, *more)
        assert result.exit_code == 2 and result.output.count("\n") == 1
        assert result.output.endswith("; choose another --output, or start over with --force\n")
        return result.output

    assert "num_inference_steps was 2 and is 3" in refused("--steps", 3)
    for function, name in (
        ("code_sha256", "code of ipa.engines and ipa.runtime"),
        ("manifest_sha256", "manifest"),
        ("machine_name", "machine"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(quality_arms, function, lambda *given: "another")
            assert f"{name} was " in refused() and "and is 'another'" in refused()
    # PyTorch's side is loaded before anything is deleted.
    base, kept = tmp_path / "unfinished", sorted((tmp_path / "pictures").rglob("*.png"))
    for part in ("model_index.json", "image_encoder/config.json"):
        (base / part).parent.mkdir(parents=True, exist_ok=True)
        (base / part).write_bytes((tiny_base / part).read_bytes())
    failed = bench_quality(tmp_path, *options, "--force", "--base", base, "--adapter", tiny_adapter_file)
    assert failed.exit_code == 2 and f"diffusers cannot load {base}" in failed.output
    assert kept and kept == sorted((tmp_path / "pictures").rglob("*.png"))
    monkeypatch.setattr(Pipeline, "run", failing(0, Pipeline.run))
    stopped = bench_quality(tmp_path, *options, "--steps", 3, "--force")
    assert stopped.exit_code == 130  # it draws
    assert stopped.output == "ipa-bench: stopped; the same command without --force goes on from here\n"
    assert not list((tmp_path / "pictures").rglob("*.png"))


def test_pytorch_that_fails_is_not_measured(
    tiny_bundle: Path,
    tiny_base: Path,
    tiny_adapter_file: Path,
    eyes: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, encoder = tmp_path / "base", tmp_path / "encoder"
    shutil.copytree(tiny_base, base)
    (base / "image_encoder").rename(encoder)  # as the official adapters come

    def full(pipe: DiffusersPipeline, request: object) -> None:
        assert pipe.has_adapter
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(DiffusersPipeline, "draw", full)
    options = ["--bundle", tiny_bundle, "--base", base, "--adapter", tiny_adapter_file, "--limit", 1, *SMALL]
    options += ["--image-encoder", encoder]
    result = bench_quality(tmp_path, *options, "--data", eyes["data"], "--clip", eyes["clip"], "--samples", 1)
    assert result.exit_code == 0, result.output
    found = record(tmp_path)
    assert [arm.name for arm in found.arms] == ["engine", "base"] and found.differences == []
    reasons = {row.name: row.reason for row in found.not_measured}
    assert reasons["torch-eager"] == "OutOfMemoryError while it drew: CUDA out of memory. Tried to allocate"
    assert not {"torch", "base", "adapter", "image_encoder"} & set(found.setting)


def test_texts_can_be_left_out(
    tiny_bundle: Path, eyes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--bundle", tiny_bundle, "--data", eyes["data"], "--clip", eyes["clip"], "--limit", 1, *SMALL]
    monkeypatch.setattr(quality_measure, "inception_obstacle", lambda: "")
    options += ["--inception", stand_in_for_inception(monkeypatch, tmp_path)]
    assert bench_quality(tmp_path, *options, "--samples", 1, "--image-only").exit_code == 0
    settings = {
        arm: json.loads((tmp_path / "pictures" / arm / "settings.json").read_text()) for arm in ("engine", "base")
    }
    assert settings["engine"]["is_image_only"] and not settings["base"]["is_image_only"]
    found = record(tmp_path)
    assert found.arms[0].fid is None  # of one picture
    assert found.setting["is_image_only"] and found.setting["images"] == 1
    assert [row.name for row in found.not_measured] == ["DINO", "torch-eager", "FID", "scale sweep"]
