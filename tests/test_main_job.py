"""The whole main job on a tiny model, by its commands: train an adapter, add it to a bundle, draw; diffusers agrees."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from ipa.engines.bundle import hash_file

PROMPT, SEED, STEPS, GUIDANCE, SCALE = "a red cat", 5, 6, 4.0, 0.9


def command(name: str, *arguments: object) -> None:
    subprocess.run([Path(sys.executable).with_name(name), *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of `ipa-train adapter`, with pictures to learn from in `pictures/`."""
    folder = tmp_path_factory.mktemp("trained")
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (80, 64, 3), np.uint8)
        Image.fromarray(noise).save(pictures / f"{number}.png")
    entries = [{"image_file": f"{number}.png", "text": "a cat"} for number in range(4)]
    (pictures / "data.json").write_text(json.dumps(entries))
    options: dict[str, Any] = {
        "base": tiny_base,
        "image-encoder": tiny_base / "image_encoder",
        "data": pictures / "data.json",
        "image-root": pictures,
        "output": folder,
        "steps": 12,
        "learning-rate": 1e-2,
        "batch-size": 4,
        "resolution": 64,
        "num-workers": 0,
    }
    command("ipa-train", "adapter", *(part for name, value in options.items() for part in (f"--{name}", value)))
    return folder


def diffusers_picture(base: Path, adapter: Path | None, image: Path) -> np.ndarray:
    pipe = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    given: dict[str, Any] = {}
    if adapter is not None:
        pipe.load_ip_adapter(str(adapter.parent), subfolder="", weight_name=adapter.name, image_encoder_folder=None)
        pipe.set_ip_adapter_scale(SCALE)
        given["ip_adapter_image"] = Image.open(image)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    sizes = {"height": 64, "width": 72, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    return np.asarray(pipe(PROMPT, generator=generator, **sizes, **given).images[0], int)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_trained_adapter_draws_what_diffusers_draws(
    trained: Path, tiny_base: Path, tiny_bundle: Path, tmp_path: Path, suffix: str
) -> None:
    adapter = trained / f"ip_adapter.{suffix}"
    image = trained / "pictures" / "2.png"
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    unet = hash_file(bundle / "unet" / "model.onnx")
    command("ipa-export", "adapter", "--bundle", bundle, "--adapter", f"mine={adapter}")
    assert hash_file(bundle / "unet" / "model.onnx") == unet

    request: dict[str, Any] = {
        "bundle": bundle,
        "adapter": "mine",
        "image": image,
        "prompt": PROMPT,
        "seed": SEED,
        "steps": STEPS,
        "guidance-scale": GUIDANCE,
        "ip-adapter-scale": SCALE,
        "height": 64,
        "width": 72,
        "scheduler": "ddim",
        "engine": "onnxruntime",
        "output": tmp_path / "ours.png",
    }
    command("ipa-run", *(part for name, value in request.items() for part in (f"--{name}", value)))

    ours = np.asarray(Image.open(tmp_path / "ours.png"), int)
    assert np.abs(ours - diffusers_picture(tiny_base, adapter, image)).max() <= 2
    assert np.abs(ours - diffusers_picture(tiny_base, None, image)).max() > 10, "the adapter does something"
