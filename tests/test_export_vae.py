"""`--vae`: another VAE in every layout, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
)
from original_layout import original_vae
from safetensors.torch import save_file
from tiny import same_weights

from ipa.engines.errors import IpaError
from ipa.export.changes import BaseChanges
from ipa.export.pipeline import BasePipeline


@pytest.mark.parametrize(
    "layout", ["folder", "pipeline", "diffusers file", "old names", "original file", "prefixed pickle"]
)
def test_another_vae_replaces_the_pipeline_s(layout: str, other_vae: Path, tiny_base: Path, tmp_path: Path) -> None:
    expected = AutoencoderKL.from_pretrained(other_vae)
    original = original_vae(expected)
    if layout == "folder":
        vae = other_vae
    elif layout == "pipeline":
        vae = Path(shutil.copytree(tiny_base, tmp_path / "pipeline"))
        shutil.copytree(other_vae, vae / "vae", dirs_exist_ok=True)
    elif layout == "diffusers file":
        vae = other_vae / "diffusion_pytorch_model.safetensors"
    elif layout == "old names":  # as sd-vae-ft-mse has them
        old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
        vae = tmp_path / "old.safetensors"
        renamed = {
            next((name.replace(new, was) for new, was in old.items() if new in name), name): tensor.contiguous()
            for name, tensor in expected.state_dict().items()
        }
        assert len([name for name in renamed if ".query." in name]) == 4  # weight and bias, twice
        save_file(renamed, vae)
    elif layout == "original file":
        vae = tmp_path / "vae.safetensors"
        save_file({**original, "loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}, vae)
    else:
        vae = tmp_path / "vae.pt"
        torch.save({"state_dict": {f"first_stage_model.{name}": tensor for name, tensor in original.items()}}, vae)
    base = BasePipeline(str(tiny_base), None, BaseChanges(vae=str(vae)))
    same_weights(base.load_vae(), expected)
    # a file does not say its scaling factor
    assert base.vae_record.scaling_factor == (0.5 if layout in ("folder", "pipeline") else 0.18215)


def test_vaes_of_other_families_are_refused(other_vae: Path, tiny_base: Path, tmp_path: Path) -> None:
    AutoencoderTiny().save_pretrained(tmp_path / "taesd")
    shifted = Path(shutil.copytree(other_vae, tmp_path / "shifted"))
    config = json.loads((shifted / "config.json").read_text())
    (shifted / "config.json").write_text(json.dumps({**config, "shift_factor": 0.1}))
    wide = Path(shutil.copytree(other_vae, tmp_path / "wide"))
    (wide / "config.json").write_text(json.dumps({**config, "latent_channels": 16}))
    for vae, message in (
        (tmp_path / "taesd", "AutoencoderTiny"),
        (shifted, "shift_factor"),
        (wide, "expected 16, as the vae"),
    ):
        with pytest.raises(IpaError, match=message):
            BasePipeline(str(tiny_base), None, BaseChanges(vae=str(vae)))
