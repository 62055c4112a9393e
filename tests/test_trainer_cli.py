"""`ipa-train adapter` as a user meets it: mistakes, help, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from ipa.trainer import cli
from ipa.trainer.progress import Progress


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    folder.mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / name)
    entries = [{"image_file": name, "text": "a cat"} for name in ("a.png", "b.png")]
    (folder / "data.json").write_text(json.dumps(entries))
    return folder


def arguments(base: Path, dataset: Path, output: Path, /, **changed: object) -> list[str]:
    given = {
        "base": base,
        "image-encoder": base / "image_encoder",
        "data": dataset / "data.json",
        "image-root": dataset,
        "output": output,
        "steps": 1,
        "resolution": 64,
        "batch-size": 1,
    } | {name.replace("_", "-"): value for name, value in changed.items()}
    return ["adapter", *(part for name, value in given.items() for part in (f"--{name}", str(value)))]


def run(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["ipa-train", *argv])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("steps", 0, "--steps is 0, expected at least 1"),
        ("steps", "many", "'many' is not a valid integer"),
        ("batch_size", 0, "--batch-size is 0"),
        ("num_tokens", 0, "--num-tokens is 0"),
        ("gradient_accumulation_steps", 0, "--gradient-accumulation-steps is 0"),
        ("checkpoint_every", 0, "--checkpoint-every is 0"),
        ("log_every", 0, "--log-every is 0"),
        ("keep_checkpoints", 1, "--keep-checkpoints is 1, expected at least 2"),
        ("num_workers", -1, "--num-workers is -1"),
        ("lr_warmup_steps", -1, "--lr-warmup-steps is -1"),
        ("learning_rate", "nan", "--learning-rate is nan"),
        ("learning_rate", 0, "--learning-rate is 0"),
        ("weight_decay", -1, "--weight-decay is -1"),
        ("timestep_bias", "inf", "--timestep-bias is inf"),
        ("resolution", 8, "--resolution is 8"),
        ("resolution", 100, "--resolution is 100, expected a multiple of 64"),
        ("seed", -1, "--seed is -1"),
        ("seed", 2**64, "--seed is 18446744073709551616"),
        ("drop_image", 0.95, "sum to at most 1"),
        ("drop_text", "nan", "sum to at most 1"),
        ("drop_both", -0.1, "at least 0"),
        ("max_grad_norm", 0, "--max-grad-norm is 0"),
        ("ema_decay", 1, "--ema-decay is 1"),
        ("mixed_precision", "fp8", "expected one of no, fp16, bf16"),
        ("lr_scheduler", "linear", "expected one of constant, cosine"),
        ("base", "/nowhere", "cannot load /nowhere, part unet: no such folder"),
        ("image_encoder", "/nowhere", "cannot load /nowhere: no such folder"),
        ("data", "/nowhere.json", "--data /nowhere.json cannot be read"),
        ("image_root", "/nowhere", "--image-root /nowhere is not a folder"),
        ("output", "/proc/nothing/here", "--output /proc/nothing/here cannot be written to"),
        ("init_adapter", "/nowhere.bin", "/nowhere.bin: no such adapter file"),
        ("unknown", 1, "No such option"),
    ],
)
def test_one_message_and_code_2(
    option: str,
    value: object,
    message: str,
    tiny_base: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = arguments(tiny_base, dataset, tmp_path / "out", **{option: value})
    assert run(argv, monkeypatch) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("ipa-train: ") and output.err.count("\n") == 1
    assert message in output.err


def test_a_base_of_another_family_is_refused(
    tiny_base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    for part in ("unet", "scheduler"):
        (base / part).mkdir(parents=True)
    for file in (tiny_base / "unet").iterdir():
        (base / "unet" / file.name).symlink_to(file)
    config = json.loads((tiny_base / "scheduler" / "scheduler_config.json").read_text())
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"prediction_type": "sample"}))
    encoder = {"image_encoder": tiny_base / "image_encoder"}
    assert run(arguments(base, dataset, tmp_path / "out", **encoder), monkeypatch) == 2
    assert "prediction type 'sample' is not supported" in capsys.readouterr().err


def test_missing_options_and_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["adapter"], monkeypatch) == 2
    assert "Missing option '--base'" in capsys.readouterr().err
    assert run(["adaptor"], monkeypatch) == 2
    assert "No such command" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--images", "0"], "'--images'"),
        (["--minutes", "nan"], "--minutes is nan"),
        (["--stage", "nonsense"], "no stage is called 'nonsense'"),
        (["--stage", "adapter"], "run the stage 'pipeline' first"),
    ],
)
def test_demo_mistakes(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["demo", "--output", str(tmp_path / "demo"), *argv], monkeypatch) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("ipa-train: ") and message in error


def test_demo_options_are_those_of_its_configuration() -> None:
    from ipa.trainer.demo.chain import DemoConfig

    names = {parameter.name for parameter in cli.demo.params} - {"output", "stages"}
    assert names == set(DemoConfig.__dataclass_fields__)


def test_help_is_complete_and_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['ipa-train', 'adapter', '--help']\n"
        "from ipa.trainer.cli import main\n"
        "main()\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part in ("--learning-rate", "[default: 0.0001]", "[default: 8]", "torchrun --nproc_per_node 2"):
        assert part in done.stdout


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(tiny_base: Path, dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    argv = [*arguments(tiny_base, dataset, output, steps=100_000, log_every=1), "--cache-latents"]
    training = subprocess.Popen(
        [sys.executable, "-m", "ipa.trainer.cli", *argv], stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    log = output / "train_log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline and training.poll() is None
        time.sleep(0.1)
    training.send_signal(signal.SIGINT)
    stderr = training.communicate(timeout=60)[1]
    assert training.returncode == 130
    last = json.loads(log.read_text().splitlines()[-1])["step"]
    message = f"ipa-train: stopped after step {last} of 100000; the checkpoint is in {output / 'checkpoints'}"
    assert stderr.splitlines()[-1].startswith(message)
    assert [entry.name for entry in (output / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    assert not (output / "ip_adapter.bin").exists() and not list(output.glob(".*"))


def test_progress_without_a_terminal_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(is_main=True) as progress:
        for step in range(1, 101):
            progress.update("training", step, 100, f"loss {step}")
    with Progress(is_main=False) as other:
        other.update("training", 100, 100)
        other.main_message("not shown")
        other.message("shown")
    assert capsys.readouterr().err == "training 100/100, loss 100\nshown\n"
