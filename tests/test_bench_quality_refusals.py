"""What `ipa-bench quality` does not take, and what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
from quality_calls import SMALL, bench_quality

from ipa.benchmarks import quality_models
from ipa.benchmarks.bundle_origin import source_folder, torch_obstacle
from ipa.engines.bundle import Bundle
from ipa.engines.errors import IpaError
from ipa.engines.manifest import LoraRecord, SourceRecord


def test_what_a_base_folder_does_not_have_is_an_obstacle(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert torch_obstacle(manifest) == ""
    vae = SourceRecord("vae.safetensors", "0")
    changed = replace(manifest, clip_skip=1, loras=(LoraRecord("a", "0", 1.0),), sources={"vae": vae})
    expected = "the bundle was made with a VAE of its own, LoRAs, clip_skip, which --base DIR does not have"
    assert torch_obstacle(changed) == expected


def test_ids_of_the_hub_are_looked_up_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(IpaError, match="--image-encoder an/encoder/models: no such folder, and the Hub's cache"):
        source_folder("--image-encoder", "an/encoder/models", "config.json")
    cached = tmp_path / "models--an--encoder"
    folder = cached / "snapshots" / ("0" * 40) / "models"
    folder.mkdir(parents=True), (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    (folder / "config.json").write_text("{}")
    assert source_folder("--image-encoder", "an/encoder/models", "config.json") == folder
    assert source_folder("--base", str(folder), "model_index.json") == folder


def test_inception_that_cannot_be_used_is_refused(
    tiny_bundle: Path, eyes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_models, "find_spec", lambda name: None)
    options = ["--bundle", tiny_bundle, "--data", eyes["data"], "--clip", eyes["clip"], *SMALL]
    result = bench_quality(tmp_path, *options, "--inception", "weights.pth")
    expected = "ipa-bench: --inception weights.pth: torch-fidelity is not installed: `pip install torch-fidelity`\n"
    assert (result.exit_code, result.output) == (2, expected)
    assert not (tmp_path / "pictures").exists()


BAD: dict[str, tuple[list[str], str]] = {
    "no data": (["--clip", "{clip}"], "--bundle {bundle} needs --data and --clip"),
    "data that is not there": (["--data", "{data}/x", "--clip", "{clip}"], "--data {data}/x: no such file or folder"),
    "data without captions": (["--data", "{clip}", "--clip", "{clip}"], "expected COCO's val2017/"),
    "another model than CLIP": (["--data", "{data}", "--clip", "{dino}"], "model_type 'vit', expected clip"),
    "base alone": (["--data", "{data}", "--clip", "{clip}", "--base", "{clip}"], "--base {clip} needs --adapter FILE"),
    "adapter alone": (["--data", "{data}", "--clip", "{clip}", "--adapter", "x"], "needs --base DIR, too"),
    "no pipeline": (
        ["--data", "{data}", "--clip", "{clip}", "--base", "{clip}", "--adapter", "x"],
        "--base {clip}: has no model_index.json",
    ),
    "no image encoder": (
        ["--data", "{data}", "--clip", "{clip}", "--base", "{bare}", "--adapter", "{adapter}"],
        "--base {bare} has no image_encoder; add --image-encoder DIR",
    ),
    "another adapter": (
        ["--data", "{data}", "--clip", "{clip}", "--base", "{base}", "--adapter", "{base}/model_index.json"],
        "but adapter 'tiny' of {bundle} was made of one with",
    ),
    "image encoder alone": (["--data", "{data}", "--clip", "{clip}", "--image-encoder", "x"], "needs --base DIR, too"),
    "LPIPS without PyTorch": (
        ["--data", "{data}", "--clip", "{clip}", "--lpips", "{lpips}"],
        "--lpips compares with PyTorch's pictures: add --base DIR --adapter FILE, or leave it out",
    ),
    "image root of COCO": (["--data", "{data}", "--clip", "{clip}", "--image-root", "x"], "not with --data {data}"),
    "no steps": (["--data", "{data}", "--clip", "{clip}", "--steps", "5000"], "num_inference_steps (--steps) is 5000"),
    "no engine": (["--data", "{data}", "--clip", "{clip}", "--engine", "steam"], "steam"),
    "no numbers": (["--data", "{data}", "--clip", "{clip}", "--sweep", "0,a"], "'0,a' is no list of numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message(
    name: str, tiny_bundle: Path, tiny_base: Path, tiny_adapter_file: Path, eyes: dict[str, Path], tmp_path: Path
) -> None:
    given = {**eyes, "bundle": tiny_bundle, "base": tiny_base, "adapter": tiny_adapter_file}
    places = {key: str(path) for key, path in given.items()}
    arguments, message = BAD[name]
    result = bench_quality(
        tmp_path / "out", "--bundle", tiny_bundle, *(argument.format(**places) for argument in arguments)
    )
    assert result.exit_code == 2 and message.format(**places) in result.output, result.output
    assert "Traceback" not in result.output
    if "Usage:" not in result.output:
        assert result.output.startswith("ipa-bench: ") and result.output.count("\n") == 1


def test_an_output_that_is_a_file_is_one_message(tiny_bundle: Path, eyes: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    result = bench_quality(tmp_path / "out", "--bundle", tiny_bundle, "--data", eyes["data"], "--clip", eyes["clip"])
    assert result.exit_code == 2 and result.output.count("\n") == 1
    assert result.output.startswith(f"ipa-bench: {tmp_path}/out") and "Not a directory" in result.output
