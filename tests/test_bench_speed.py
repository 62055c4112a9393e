"""`ipa-bench speed` as its user runs it, on tiny models with every CPU contender."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny import HEADS, WIDTHS

from ipa.benchmarks import models, rates, speed
from ipa.benchmarks.cli import main
from ipa.benchmarks.full_size import SMALL
from ipa.benchmarks.overhead import Pair, measure_overhead
from ipa.benchmarks.processes import Entry
from ipa.benchmarks.records import NotMeasured, Overhead, SpeedRecord, read_record
from ipa.benchmarks.speed_options import SpeedOptions
from ipa.benchmarks.speed_run import Outcome, SpeedRun
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
    assert "ipa-runtime" in record.setting["bundle_created_by"]


def test_start_up_is_that_of_the_code() -> None:
    row = start_up("a", "import time; time.sleep(0.3); block = bytearray(50 * 2**20)", ("click",), 10**6)
    assert 0.25 < row.import_seconds < 1.5
    assert 50 < row.rss_mib < 100
    assert 1.1 < row.installed_mb < 5  # click alone


def test_start_up_is_timed_with_bytecode_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "large.py").write_text("")
    log = tmp_path / "log"
    is_cached = "os.path.exists(importlib.util.cache_from_source(importlib.util.find_spec('large').origin))"
    code = f"import importlib.util, os; open({str(log)!r}, 'a').write(str({is_cached}) + ' '); import large"
    start_up("a", code, ("click",))
    first, *others = log.read_text().split()
    assert (first, set(others)) == ("False", {"True"})
    assert not (tmp_path / "__pycache__").exists()


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
        (["--base", "."], "--base goes with a bundle of yours, --model demo has its own: leave it out"),
        (["--engine", "onnxruntime-plain"], "no contender can run: onnxruntime-plain: there is no ordinary graph"),
        (["--task", "controlnet"], "has no ControlNet"),
        (["--engine", "onnxruntime,onnxruntime"], "--engine names 'onnxruntime' more than once"),
        (["--guidance-scale", "nan"], "guidance_scale is nan"),
        (["--steps", "1001"], "num_inference_steps (--steps) is 1001"),
        (["--base", "nowhere"], "--base nowhere is neither a folder nor a Hub id"),
        (["--base", "."], "--base . has no unet/config.json"),
        (["--adapter", "nowhere"], "--adapter nowhere cannot be read: No such file"),
        (["--adapter", __file__], "but adapter 'tiny' of"),
        (["--controlnet", "x"], "--controlnet goes with --task controlnet, --task is variation"),
        (["--controlnet", "nowhere", "--task", "controlnet"], "--controlnet nowhere has no config.json"),
        (["--models", "/dev/null/x"], "--models /dev/null/x cannot be written: Not a directory"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str, tiny_bundle: Path, tmp_path: Path) -> None:
    model = [] if options[0] == "--model" or "demo has its own" in message else ["--model", tiny_bundle]
    result = bench("--output", tmp_path, *model, *options)
    assert result.exit_code == 2, result.output
    assert message in result.output and len(result.output.splitlines()) == 1
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "warp"], "unknown contender 'warp'"),
        (["--resolution", "big"], "--resolution is 'big'"),
        (["--resolution", "100x100"], "expected a multiple of 8"),
        (["--guidance-scale", "nan"], "guidance_scale is nan"),
        (["--adapter", "x"], "--adapter goes with a bundle of yours, --model sd15 has its own"),
        (["--output", "/dev/null/x"], "--output /dev/null/x cannot be written: Not a directory; give another folder"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_made(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "preset", lambda *given: pytest.fail("gigabytes would be written"))
        result = bench("--model", "sd15", "--output", tmp_path, *options)
    assert result.exit_code == 2, result.output
    assert message in result.output and len(result.output.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_record_is_named_for_what_is_not_usual() -> None:
    usual = SpeedOptions("sd15", Path(), Path())
    work = usual.setting((512, 512), None)
    assert usual.record_name("sd15", work, (512, 512)) == "speed_sd15_variation.json"
    wide = replace(usual, resolution="768x512", batch=4)
    assert wide.record_name("sd15", wide.setting((512, 512), None), (512, 512)) == (
        "speed_sd15_variation_768x512_batch4.json"
    )
    other = replace(usual, task="img2img", steps=30, scheduler="euler", guidance_scale=7.5, resolution="512x512")
    assert other.record_name("a b", other.setting((512, 512), None), (512, 512)) == (
        "speed_a_b_img2img_steps30_euler_guidance7.5.json"
    )


def test_ctrl_c_skips_the_rest_and_keeps_the_record(tiny_bundle: Path, tmp_path: Path) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "start_ups", interrupted)
        result = own(tiny_bundle, tmp_path)
    assert result.exit_code == 130, result.output
    found = written(tmp_path)
    assert [one.name for one in found.contenders] == ["onnxruntime"]
    assert {one.name: one.reason for one in found.not_measured}["start-up"] == "the run was interrupted"


def test_ctrl_c_between_contenders_skips_what_comes_after(tiny_bundle: Path, tmp_path: Path) -> None:
    class Interrupted(SpeedRun):
        def run(self) -> Outcome:
            outcome = super().run()
            outcome.is_interrupted = True
            return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "SpeedRun", Interrupted)
        patch.setattr(speed, "start_ups", lambda: pytest.fail("was interrupted"))
        result = own(tiny_bundle, tmp_path)
    assert result.exit_code == 130, result.output
    assert {one.name: one.reason for one in written(tmp_path).not_measured}["start-up"] == "the run was interrupted"


def test_what_fails_after_the_contenders_is_listed(tiny_bundle: Path, tmp_path: Path) -> None:
    def broken() -> None:
        raise subprocess.CalledProcessError(1, ["python"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "start_ups", broken)
        result = own(tiny_bundle, tmp_path)
    assert result.exit_code == 0, result.output
    assert {one.name: one.reason for one in written(tmp_path).not_measured}["start-up"].startswith("CalledProcessError")


def own(bundle: Path, output: Path) -> Result:
    options = ["--pairs", 2, "--steps", 2, "--block-steps", 2, "--engine", "onnxruntime"]
    return bench("--output", output, "--model", bundle, *options)


def written(folder: Path) -> SpeedRecord:
    (file,) = folder.glob("speed_*_steps2.json")
    found = read_record(file)
    assert isinstance(found, SpeedRecord)
    return found


def test_rates_that_cannot_be_measured_are_told() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rates.SIDE, "cpu", 16)
        patch.setitem(rates.COPY_BYTES, "cpu", 2**62)
        with pytest.raises(rates.RatesError, match=r"its process ended with code 1: .*memory"):
            rates.measured("cpu")


def test_the_overhead_keeps_rows_that_come_before_an_interruption() -> None:
    """Rows go where the caller has them already."""

    def rows() -> Iterator[Pair]:
        sleeper = Entry("with", "", "bench_fakes:Sleeper", {"seconds": 0.0})
        yield Pair("hoisted", "x", 4, sleeper, sleeper)
        yield Pair("broken", "x", 4, sleeper, replace(sleeper, options={"seconds": 0.0, "fails": "open"}))
        raise KeyboardInterrupt

    found, missing = list[Overhead](), list[NotMeasured]()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
        measure_overhead(rows(), 2, lambda text, done: None, found, missing)
    assert [row.name for row in found] == ["hoisted"]
    assert [one.name for one in missing] == ["cost of the image prompt: broken (x)"]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device", "x.json"), 2, "ipa-bench: x.json: No space left on device"),
        (KeyboardInterrupt(), 130, "ipa-bench: interrupted before anything was measured"),
    ],
)
def test_what_ends_a_run_is_told(error: BaseException, code: int, message: str, tmp_path: Path) -> None:
    def ends(options: SpeedOptions) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "measure_speed", ends)
        result = bench("--output", tmp_path)
    assert (result.exit_code, result.output.strip()) == (code, message)
