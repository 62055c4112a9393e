"""Whole training runs on a tiny random pipeline of SD1.5's topology, 8x8 latents."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from ipa.trainer import adapter, interrupt
from ipa.trainer.adapter import train_adapter
from ipa.trainer.errors import TrainError
from ipa.trainer.interrupt import TrainStoppedError
from ipa.trainer.model import AdapterModel
from ipa.trainer.options import AdapterOptions
from ipa.trainer.weights import load_adapter

EMBED, CROSS = 40, 48


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 records, one with a reference image of its own."""
    folder = tmp_path_factory.mktemp("dataset")
    random = np.random.default_rng(0)
    records = []
    for number in range(10):
        colour = random.integers(0, 256, 3)
        Image.fromarray(np.tile(colour, (70, 64, 1)).astype(np.uint8)).save(folder / f"{number}.png")
        records.append({"image_file": f"{number}.png", "text": ("a cat", "a dog", "red house")[number % 3]})
    records[3]["reference_file"] = "7.png"
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def options(tiny_base: Path, dataset: Path, tmp_path: Path) -> AdapterOptions:
    return AdapterOptions(
        base=str(tiny_base),
        image_encoder=str(tiny_base / "image_encoder"),
        data=dataset / "data.json",
        image_root=dataset,
        output=tmp_path / "out",
        steps=4,
        learning_rate=1e-3,
        batch_size=2,
        resolution=64,
        cache_latents=True,
        checkpoint_every=2,
        log_every=1,
    )


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "train_log.jsonl").read_text().splitlines()]


def assert_same_weights(one: Path, two: Path) -> None:
    first, second = load_adapter(one / "ip_adapter.safetensors"), load_adapter(two / "ip_adapter.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.mark.parametrize("name", ["ip_adapter.safetensors", "ip_adapter.bin"])
def test_diffusers_loads_the_result_and_computes_the_same(options: AdapterOptions, tiny_base: Path, name: str) -> None:
    before = hashes(tiny_base)
    result = train_adapter(replace(options, steps=2))
    assert hashes(tiny_base) == before

    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet").eval()
    ours = AdapterModel(unet, EMBED, 4)
    ours.load_adapter_state_dict(load_adapter(options.output / name), name)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    pipeline.load_ip_adapter(str(options.output), subfolder="", weight_name=name, image_encoder_folder=None)
    generator = torch.Generator().manual_seed(0)
    sample, timesteps = torch.randn(2, 4, 8, 12, generator=generator), torch.tensor([3, 700])
    text, embeds = torch.randn(2, 77, CROSS, generator=generator), torch.randn(2, EMBED, generator=generator)
    for scale in (1.0, 0.4):
        pipeline.set_ip_adapter_scale(scale)
        for processor in ours.processors:
            processor.scale = scale
        with torch.no_grad():
            expected = pipeline.unet(sample, timesteps, text, added_cond_kwargs={"image_embeds": [embeds[:, None]]})
            got = ours(sample, timesteps, text, embeds)
        assert expected.sample.abs().mean() > 0.1
        torch.testing.assert_close(got, expected.sample, rtol=0, atol=1e-5)  # float32 rounding in another order
    assert result.final_loss > 0


def test_the_record_of_a_run(options: AdapterOptions) -> None:
    result = train_adapter(replace(options, lr_warmup_steps=2))
    summary = json.loads(result.summary.read_text())
    assert summary["steps"] == 4 and summary["records"] == 10 and summary["records_skipped"] == 0
    assert summary["trained_parameters"] == 86304
    assert summary["options"]["learning_rate"] == 1e-3 and "torch" in summary["versions"]
    lines = [json.loads(line) for line in (options.output / "train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["lr"] for line in lines] == [5e-4, 1e-3, 1e-3, 1e-3]
    assert all(line["loss"] > 0 and line["rate"] > 0 for line in lines)
    saved = sorted(entry.name for entry in (options.output / "checkpoints").iterdir())
    assert saved == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cache_latents": False, "gradient_accumulation_steps": 2, "batch_size": 1, "ema_decay": 0.9},
    ],
    ids=["cached", "live, accumulated, averaged"],
)
def test_resume_continues_as_if_never_stopped(options: AdapterOptions, tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = replace(options, output=tmp_path / "whole", **changes)
    parts = replace(options, output=tmp_path / "parts", **changes)
    train_adapter(whole)
    train_adapter(replace(parts, steps=3))
    with (parts.output / "train_log.jsonl").open("a") as log:
        log.write('{"step": 4, "loss": 99.0, "lr": 1, "rate": 1}\n{"step": 5, "lo')  # a run killed after its checkpoint
    train_adapter(parts)
    assert losses(parts.output) == losses(whole.output)
    assert_same_weights(parts.output, whole.output)


def test_seed_and_no_resume(options: AdapterOptions, tmp_path: Path) -> None:
    train_adapter(replace(options, steps=2))
    first = losses(options.output)
    train_adapter(replace(options, steps=2, resume=False))  # from the start: the same again
    assert losses(options.output) == first
    assert (options.output / "checkpoints.1" / "step-00000002").is_dir()
    train_adapter(replace(options, steps=2, seed=1, output=tmp_path / "other"))
    assert losses(tmp_path / "other") != first


def test_resume_with_other_options_or_data_is_refused(options: AdapterOptions, dataset: Path, tmp_path: Path) -> None:
    train_adapter(replace(options, steps=2))
    with pytest.raises(TrainError, match=r"batch size 2, this run has 3.*--no-resume"):
        train_adapter(replace(options, batch_size=3))
    records = json.loads((dataset / "data.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(records[::-1]))
    with pytest.raises(TrainError, match="data sha256"):
        train_adapter(replace(options, data=tmp_path / "other.json"))


def test_a_damaged_checkpoint_is_passed_over(options: AdapterOptions, capsys: pytest.CaptureFixture[str]) -> None:
    train_adapter(options)
    complete = losses(options.output)
    (options.output / "checkpoints" / "step-00000004" / "optimizer.pt").write_bytes(b"")
    train_adapter(options)
    assert "step-00000004 is skipped: optimizer.pt has 0 bytes" in capsys.readouterr().err
    assert losses(options.output) == complete


def test_encoding_live_or_once_is_the_same(options: AdapterOptions, tmp_path: Path) -> None:
    train_adapter(options)
    train_adapter(replace(options, cache_latents=False, num_workers=1, output=tmp_path / "live"))
    # the encoders see other batch sizes: float32 rounding, grown over four steps
    np.testing.assert_allclose(losses(tmp_path / "live"), losses(options.output), rtol=1e-4)


def test_half_precision_encoders_learn_nearly_the_same(options: AdapterOptions, tmp_path: Path) -> None:
    train_adapter(replace(options, steps=2))
    train_adapter(replace(options, steps=2, mixed_precision="bf16", output=tmp_path / "bf16"))
    full, half = losses(options.output), losses(tmp_path / "bf16")
    assert half != full
    np.testing.assert_allclose(half, full, rtol=0.02)  # bfloat16 keeps 8 bits: 0.4 % a number


def test_a_full_disk_is_one_message(options: AdapterOptions) -> None:
    """The limit on file sizes stands in for the disk: both libraries fail while they write."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (300_000, 500_000):  # within the adapter's file, within the optimizer's
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(TrainError, match=r"step 2 could not be saved.*the disk may be full.*run the same"):
                train_adapter(options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    train_adapter(options)
    assert len(losses(options.output)) == 4


def test_init_adapter_and_num_tokens(
    options: AdapterOptions, tiny_adapter_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_adapter(replace(options, steps=1, learning_rate=1e-12, weight_decay=0.0, init_adapter=tiny_adapter_file))
    trained, start = load_adapter(options.output / "ip_adapter.bin"), load_file(tiny_adapter_file)
    assert all(torch.allclose(trained[name], start[name], atol=1e-6) for name in start)
    with pytest.raises(TrainError, match="another number of tokens"):
        train_adapter(replace(options, num_tokens=8, init_adapter=tiny_adapter_file, resume=False))
    assert "exactly 4 tokens" in capsys.readouterr().err
    train_adapter(replace(options, steps=1, num_tokens=8, resume=False))
    assert load_adapter(options.output / "ip_adapter.bin")["image_proj.proj.weight"].shape == (8 * CROSS, EMBED)


@pytest.mark.parametrize("cache", [True, False])
def test_broken_images_are_skipped_and_named_once(
    options: AdapterOptions, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: bool
) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for number in range(10):
        (root / f"{number}.png").write_bytes((dataset / f"{number}.png").read_bytes())
    (root / "1.png").write_bytes(b"no image")
    (root / "7.png").unlink()  # its own record and that of 3.png, which has it as reference
    run = replace(options, image_root=root, cache_latents=cache, steps=8)
    result = train_adapter(run)
    messages = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert sorted(messages) == [
        f"skipped {root / '1.png'}: not a JPEG, PNG, WebP, BMP, TIFF or GIF image",
        f"skipped {root / '7.png'}: the file is missing or cannot be read",
    ]
    assert result.skipped == 3
    for file in root.iterdir():
        file.write_bytes(b"")
    with pytest.raises(TrainError, match="missing or broken images"):
        train_adapter(replace(run, resume=False))


def test_a_loss_that_is_not_a_number_stops_training(options: AdapterOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    original = adapter.training_loss
    monkeypatch.setattr(adapter, "training_loss", lambda *args: original(*args) * float("nan"))
    with pytest.raises(TrainError, match="the loss of step 1 is nan"):
        train_adapter(options)
    assert not (options.output / "ip_adapter.bin").exists()


def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_exactly(
    options: AdapterOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_adapter(replace(options, output=tmp_path / "whole"))
    original, calls = adapter.training_loss, iter(range(100))

    def with_signal(*args: Any) -> Any:
        if next(calls) == 2:
            os.kill(os.getpid(), interrupt.signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(adapter, "training_loss", with_signal)
    with pytest.raises(TrainStoppedError, match=r"after step 3 of 4.*run the same command again") as caught:
        train_adapter(options)
    assert caught.value.signum == interrupt.signal.SIGINT
    train_adapter(options)
    assert losses(options.output) == losses(tmp_path / "whole")
    assert_same_weights(options.output, tmp_path / "whole")


def flags(options: AdapterOptions) -> Iterator[str]:
    for name in ("base", "image_encoder", "data", "image_root", "output", "steps", "learning_rate", "resolution"):
        yield from (f"--{name.replace('_', '-')}", str(getattr(options, name)))
    yield from ("--cache-latents", "--log-every", "1")


def test_two_processes_learn_what_one_learns(options: AdapterOptions, tmp_path: Path) -> None:
    train_adapter(options)
    run = replace(options, output=tmp_path / "two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "ipa.trainer.cli", "adapter", *flags(run), "--batch-size", "1"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(run.output / name) for name in ("ip_adapter.safetensors", "ip_adapter.bin")]
    assert json.loads((run.output / "training.json").read_text())["processes"] == 2
    # gradients are averaged in another order: float32 rounding, grown over four steps
    np.testing.assert_allclose(losses(run.output), losses(options.output), rtol=1e-4)
