"""Weights that are missing, damaged or dangerous: refused by name, never replaced by random numbers."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny import EMBED_WIDTH, tiny_image_encoder
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionModel

from ipa.engines.errors import IpaError
from ipa.export.cli import main
from ipa.export.pipeline import BasePipeline
from ipa.export.weight_files import read_weights
from ipa.trainer.errors import TrainError
from ipa.trainer.weights import load_adapter

UNET_FILE, TEXT_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"


class Payload:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch pwned",)


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A pipeline that the test may change."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def load(base: Path, part: str, image_encoder: Path | None = None) -> torch.nn.Module:
    pipeline = BasePipeline(str(base), image_encoder and str(image_encoder))
    model: torch.nn.Module = getattr(pipeline, f"load_{part}")()
    return model


@pytest.mark.parametrize(
    ("part", "file", "weight"),
    [
        ("unet", UNET_FILE, "mid_block.attentions.0.proj_in.weight"),
        ("vae", UNET_FILE, "decoder.conv_out.bias"),
        ("text_encoder", TEXT_FILE, "encoder.layers.1.mlp.fc1.weight"),
        ("image_encoder", TEXT_FILE, "visual_projection.weight"),
    ],
)
def test_a_missing_weight_is_named(part: str, file: str, weight: str, base: Path) -> None:
    state = load_file(base / part / file)
    (name,) = [name for name in state if name.endswith(weight)]
    del state[name]
    save_file(state, base / part / file, metadata={"format": "pt"})
    with pytest.raises(IpaError, match=rf"cannot load {part} of .*: its weights miss (text_model\.)?{weight};"):
        load(base, part)


def test_weights_of_older_versions_miss_nothing(base: Path) -> None:
    """diffusers renamed the VAE's attention, transformers once saved the positions."""
    renamed = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state, old = load_file(base / "vae" / UNET_FILE), {}
    for name, tensor in state.items():
        for new_part, old_part in renamed.items():
            name = name.replace(new_part, old_part)
        old[name] = tensor
    assert old.keys() != state.keys()
    save_file(old, base / "vae" / UNET_FILE, metadata={"format": "pt"})
    loaded = load(base, "vae").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    text = load_file(base / "text_encoder" / TEXT_FILE)
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file({**text, **positions}, base / "text_encoder" / TEXT_FILE, metadata={"format": "pt"})
    load(base, "text_encoder")


def test_a_whole_clip_model_is_an_image_encoder(tiny_base: Path, tmp_path: Path) -> None:
    vision = tiny_image_encoder().config
    text = CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=EMBED_WIDTH)
    expected = CLIPModel(config)
    expected.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["vision_config"]["projection_dim"] = 7  # the whole model's counts
    (tmp_path / "config.json").write_text(json.dumps(written))
    found, pixels = load(tiny_base, "image_encoder", tmp_path), torch.rand(1, 3, 48, 48)
    with torch.no_grad():
        embeds = expected.visual_projection(expected.vision_model(pixels).pooler_output)
        torch.testing.assert_close(found(pixels).image_embeds, embeds)


def test_a_clip_model_without_projection_is_no_image_encoder(tiny_base: Path, tmp_path: Path) -> None:
    CLIPVisionModel(tiny_image_encoder().config).save_pretrained(tmp_path)
    with pytest.raises(IpaError, match=r"miss visual_projection\.weight; .* of class CLIPVisionModelWithProjection"):
        load(tiny_base, "image_encoder", tmp_path)


@pytest.mark.parametrize("part", ["unet", "image_encoder"])
def test_a_payload_is_refused_in_our_words(
    part: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (file,) = (base / part).glob("*.safetensors")
    file.unlink()
    name = "pytorch_model.bin" if part == "image_encoder" else "diffusion_pytorch_model.bin"
    torch.save({"x": Payload()}, base / part / name)
    with pytest.raises(IpaError, match=rf"cannot load {part} of .*would run code when loaded") as refusal:
        load(base, part)
    assert "weights_only" not in str(refusal.value), "how to run it is no advice"
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("is_legacy", [False, True])
def test_damaged_pickles_are_one_message(is_legacy: bool, tmp_path: Path) -> None:
    state = {"image_proj": {"proj.weight": torch.ones(3, 3)}, "ip_adapter": {"1.to_k_ip.weight": torch.ones(2, 2)}}
    torch.save(state, tmp_path / "good.bin", _use_new_zipfile_serialization=not is_legacy)
    good, dice, file = (tmp_path / "good.bin").read_bytes(), random.Random(1), tmp_path / "bad.bin"
    refused = 0
    for _ in range(150):
        data = bytearray(good)
        if dice.random() < 0.3:
            data = data[: dice.randrange(len(data))]
        else:
            data[dice.randrange(min(len(data), 400))] = dice.randrange(256)
        file.write_bytes(data)
        for read in (lambda: read_weights(file, "adapter"), lambda: load_adapter(file)):
            try:
                read()
            except (IpaError, TrainError) as error:
                assert str(file) in str(error)
                refused += 1
    assert refused > 100


def test_what_is_no_pickle_is_not_called_dangerous_alone(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "page.ckpt").write_text("<!DOCTYPE html><html>404</html>")
    result = CliRunner().invoke(main, ["onnx", "--base", str(tmp_path / "page.ckpt"), "--output", str(tmp_path / "o")])
    assert (result.exit_code, "it is damaged, or" in result.stderr) == (2, True), result.output


def test_eight_bit_floats_are_numbers(tmp_path: Path) -> None:
    state = {"image_proj.proj.weight": torch.ones(2, 2), "ip_adapter.1.to_k_ip.weight": torch.ones(2, 2)}
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}
    save_file(small, tmp_path / "small.safetensors")
    assert torch.equal(load_adapter(tmp_path / "small.safetensors")["image_proj.proj.weight"].float(), torch.ones(2, 2))
    save_file({**small, "image_proj.x": torch.tensor([torch.nan])}, tmp_path / "nan.safetensors")
    with pytest.raises(TrainError, match=r"image_proj\.x holds values that are not finite"):
        load_adapter(tmp_path / "nan.safetensors")
