"""SD1.5 at full size, random weights: FP16 export, all engines on a machine without a GPU, one checkpoint file."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from original_layout import original_state_dict, write_checkpoint
from safetensors.torch import load_file
from tiny import same_weights

from ipa.benchmarks.full_size import write_pipeline
from ipa.engines.bundle import Bundle
from ipa.engines.plan_cache import PlanCache
from ipa.export.pipeline import BasePipeline
from ipa.export.single_file import Checkpoint

MAX_MEMORY = 16 * 2**20  # KiB, as getrusage counts


def command(*arguments: object) -> str:
    return subprocess.run([*map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.slow
def test_the_full_set_exports_and_builds(tmp_path: Path) -> None:
    models, bundle, cache = tmp_path / "sd15", tmp_path / "bundle", tmp_path / "cache"
    export = Path(sys.executable).with_name("ipa-export")
    command(sys.executable, "-m", "ipa.benchmarks.full_size", "--output", models)
    adapter = models / "ip-adapter.safetensors"
    command(export, "onnx", "--base", models / "base", "--adapter", adapter, "--dtype", "fp16", "--output", bundle)
    build = [export, "build-engines", "--bundle", bundle, "--engine", "tensorrt-rtx", "--cache", cache]
    sizes = ["--resolution", "512x512", "--resolution", "256x256", "--resolution", "768x768"]
    assert "7 built, 0 kept" in command(*build, *sizes)
    again = command(*build, *sizes)
    assert "0 built, 7 kept" in again
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < MAX_MEMORY
    headers = {header.key.component: header for _, header in PlanCache(cache).headers()}
    assert set(headers) == {*Bundle.open(bundle, verify=False).manifest.components, "ip_adapter/ip-adapter"}
    assert headers["unet"].tensors["sample"] == "float16 1x4x32x32:2x4x64x64:8x4x96x96"
    assert headers["unet"].tensors["image_kv"] == "float16 1x1x24960:2x4x24960:8x1028x24960"


@pytest.mark.slow
def test_a_full_size_checkpoint_loads_with_the_shipped_configurations(tmp_path: Path) -> None:
    """Random weights of SD1.5's sizes in half precision, 2.1 GB; about 8 GiB of memory at the peak."""
    write_pipeline(tmp_path / "base")
    file = write_checkpoint(tmp_path / "base", tmp_path / "sd15.safetensors", torch.float16)
    image_encoder = str(tmp_path / "base" / "image_encoder")
    base, expected = BasePipeline(str(file), image_encoder), BasePipeline(str(tmp_path / "base"))
    assert Checkpoint(file).parts == {"unet", "vae", "text_encoder"}
    unet = base.load_unet()
    for name, tensor in expected.load_unet().state_dict().items():
        assert torch.equal(unet.get_parameter(name), tensor.half().float()), name
    del unet
    same_weights(base.load_vae(), expected.load_vae().half().float())
    same_weights(base.load_text_encoder(), expected.load_text_encoder().half().float())
    assert base.defaults.height == 512
    assert base.vae_record.downscale == 8
    assert len(original_state_dict(StableDiffusionPipeline.from_pretrained(tmp_path / "base"))) == len(load_file(file))
