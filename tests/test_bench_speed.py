"""`ipa-bench speed` as its user runs it, on tiny models with every CPU contender."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny import HEADS, WIDTHS

from ipa.benchmarks import models, rates
from ipa.benchmarks.cli import main
from ipa.benchmarks.full_size import SMALL
from ipa.benchmarks.records import SpeedRecord, read_record
from ipa.benchmarks.start_up import start_up


def bench(*options: object) -> Result:
    with pytest.MonkeyPatch.context() as patch:  # rates of a smaller machine: what is tested is that they are there
        patch.setitem(rates.SIDE, "cpu", 128)
        patch.setitem(rates.COPY_BYTES, "cpu", 2**20)
        return CliRunner().invoke(main, ["speed", *map(str, options)])


def record_of(result: Result) -> SpeedRecord:
    assert result.exit_code == 0, result.output
    record = read_record(Path(result.output.splitlines()[-1]))
    assert isinstance(record, SpeedRecord)
    return record


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> SpeedRecord:
    folder = tmp_path_factory.mktemp("speed")
    tiny: dict[str, Any] = {**SMALL.unet, "block_out_channels": WIDTHS, "attention_head_dim": HEADS, "sample_size": 8}
    sizes = replace(SMALL, unet=tiny, vae={**SMALL.vae, "sample_size": 64})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.PRESETS, "small", ("tiny", sizes))
        names = "torch-eager,onnxruntime-plain,onnxruntime,tensorrt"
        return record_of(
            bench(
                "--output", folder, "--model", "small", "--engine", names, "--pairs", 2, "--steps", 3, "--no-start-up"
            )
        )


def test_every_contender_is_measured(record: SpeedRecord) -> None:
    assert [one.name for one in record.contenders] == ["torch-eager", "onnxruntime-plain", "onnxruntime"]
    assert record.baseline == "torch-eager" and record.null is not None
    for one in record.contenders:
        assert (one.ratio is None) == (one.name == record.baseline)
        assert one.dtype == "float32" and one.times_floor is not None and one.times_floor > 0
        assert one.seconds_per_image > 3 * one.step_seconds.value
        assert {"text", "image", "vae_decoder"} <= set(one.stage_seconds)
        assert one.peak_host_mib > 30
    stages = {one.name: set(one.stage_seconds) for one in record.contenders}
    # In the other two the adapter is a part of the step.
    assert {name for name, found in stages.items() if "adapter" in found} == {"onnxruntime"}


def test_our_process_has_no_pytorch(record: SpeedRecord) -> None:
    eager, _, ours = record.contenders
    assert ours.peak_host_mib < eager.peak_host_mib - 100  # what importing PyTorch and diffusers takes


def test_what_cannot_run_says_why(record: SpeedRecord) -> None:
    (missing,) = record.not_measured
    assert missing.name == "tensorrt" and missing.reason


def test_the_image_prompt_has_rows_of_its_own(record: SpeedRecord) -> None:
    assert [(row.name, row.contender, row.tokens) for row in record.overhead] == [
        ("hoisted, 4 tokens", "onnxruntime", 4),
        ("hoisted, 16 tokens", "onnxruntime", 16),
        ("in the graph, 4 tokens", "onnxruntime-plain", 4),
        ("in the graph, 16 tokens", "onnxruntime-plain", 16),
        ("diffusers, 4 tokens", "torch-eager", 4),
    ]
    for row in record.overhead:
        assert row.ratio.value == pytest.approx(row.with_seconds / row.without_seconds, rel=0.5)


def test_the_record_says_what_was_done(record: SpeedRecord) -> None:
    expected = {"model": "small", "task": "variation", "images": 1, "unet_batch": 2, "height": 64, "width": 64}
    expected |= {
        "steps": 3,
        "block_steps": 3,
        "image_tokens": 4,
        "scheduler": "ddim",
        "guidance_scale": 5.0,
        "pairs": 2,
    }
    assert {name: record.setting[name] for name in expected} == expected
    assert record.gflop["unet"] > 0 and record.rates["matmul_gflops"]["float32"] > 0
    assert {"torch", "diffusers", "onnxruntime"} <= set(record.origin.versions)


def test_start_up_is_that_of_the_code() -> None:
    row = start_up("a", "import time; time.sleep(0.3); block = bytearray(50 * 2**20)", ("click",), 10**6)
    assert 0.25 < row.import_seconds < 1.5
    assert 50 < row.rss_mib < 100
    assert 1.1 < row.installed_mb < 5  # click alone


def test_a_bundle_without_its_models(tiny_bundle: Path, tmp_path: Path) -> None:
    options = ["--pairs", 2, "--steps", 2, "--block-steps", 2, "--no-start-up", "--engine", "torch-eager,onnxruntime"]
    record = record_of(bench("--output", tmp_path, "--model", tiny_bundle, *options, "--resolution", "64x64"))
    assert [one.name for one in record.contenders] == ["onnxruntime"]
    assert record.contenders[0].floor_seconds is None
    reasons = {one.name: one.reason for one in record.not_measured}
    assert reasons["torch-eager"].endswith("add --base and --adapter")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere"], "--model nowhere is no folder, and none of sd15, sdxl, small, demo"),
        (["--engine", "warp"], "unknown contender 'warp', expected some of torch-eager"),
        (["--resolution", "big"], "--resolution is 'big', expected WIDTHxHEIGHT"),
        (["--resolution", "100x100"], "expected a multiple of 8"),
        (["--base", "x"], "--base goes with a bundle of yours, --model demo has its own: leave it out"),
        (["--engine", "onnxruntime-plain"], "no contender can run: onnxruntime-plain: there is no ordinary graph"),
        (["--task", "controlnet"], "has no ControlNet"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str, tiny_bundle: Path, tmp_path: Path) -> None:
    model = [] if options[0] in ("--model", "--base") else ["--model", tiny_bundle]
    result = bench("--output", tmp_path, *model, *options)
    assert result.exit_code == 2, result.output
    assert message in result.output and len(result.output.splitlines()) == 1
    assert not list(tmp_path.glob("*.json"))
