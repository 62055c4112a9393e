"""A changed base of Stable Diffusion XL: one checkpoint file, LoRAs, words and clip skip at once, against diffusers.

Tolerances as in test_fidelity.py.
"""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from lora_files import as_kohya, write_lora
from original_layout import write_checkpoint
from parity import assert_same_latents
from safetensors.torch import load_file, save_file
from words import load_words, xl_vectors
from xl_oracle import make_request

from ipa.export.changes import BaseChanges
from ipa.export.cli import main
from ipa.export.lora import LoraFile
from ipa.export.textual_inversion import TextualInversionFile
from ipa.export.validate import Validator
from ipa.runtime import Pipeline

SCALES = {"style": 0.8, "detail": -0.4}
WORDS = {"toy": "<toy>", "hat": "hat"}  # the second is its file's name
FIELDS: dict[str, Any] = {
    "prompt": "a <toy> cat with hat on the grass!",
    "negative_prompt": "hat, red dog",
    "width": 72,
}


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def files(tiny_xl_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Everything that a base model can be made of; one LoRA as kohya saves it."""
    folder = tmp_path_factory.mktemp("files")
    ignored = shutil.ignore_patterns("*.safetensors", "image_encoder")
    found = {
        "base": write_checkpoint(tiny_xl_base, folder / "model.safetensors"),
        "config": Path(shutil.copytree(tiny_xl_base, folder / "config", ignore=ignored)),
        "style": folder / "style.safetensors",
        "detail": write_lora(tiny_xl_base, folder, seed=1, with_metadata=True),
        "toy": folder / "toy.safetensors",
        "hat": folder / "hat.safetensors",
    }
    kohya = as_kohya(load_file(write_lora(tiny_xl_base, folder / "peft")), with_sgm=True)
    save_file({name: tensor.contiguous() for name, tensor in kohya.items()}, found["style"])
    save_file(xl_vectors(3), found["toy"])
    save_file(xl_vectors(1, seed=1), found["hat"])
    return found


@pytest.fixture(scope="module")
def source(files: dict[str, Path], tiny_xl_base: Path) -> list[object]:
    return ["--base", files["base"], "--config", files["config"], "--image-encoder", tiny_xl_base / "image_encoder"]


@pytest.fixture(scope="module")
def bundle(
    files: dict[str, Path],
    source: list[object],
    tiny_xl_files: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    output = tmp_path_factory.mktemp("bundle") / "bundle"
    loras = [part for name, scale in SCALES.items() for part in ("--lora", f"{files[name]}={scale}")]
    words = ["--textual-inversion", f"{files['toy']}=<toy>", "--textual-inversion", files["hat"]]
    adapter = ["--adapter", f"base={tiny_xl_files['base']}"]
    result = run("onnx", *source, *loras, *words, *adapter, "--clip-skip", 1, "--output", output)
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="module")
def oracle(files: dict[str, Path], tiny_xl_base: Path, tiny_xl_files: dict[str, Path]) -> Any:
    """diffusers' pipeline of the same file, changed by diffusers' own loaders."""
    whole = StableDiffusionXLPipeline.from_pretrained(tiny_xl_base, local_files_only=True, add_watermarker=False)
    pipe = StableDiffusionXLPipeline.from_single_file(
        str(files["base"]),
        config=str(files["config"]),
        local_files_only=True,
        add_watermarker=False,
        image_encoder=whole.image_encoder,
        feature_extractor=whole.feature_extractor,
    )
    for name, scale in SCALES.items():
        pipe.load_lora_weights(files[name].parent, weight_name=files[name].name)
        pipe.fuse_lora(lora_scale=scale)
        pipe.unload_lora_weights()
    for name, word in WORDS.items():
        load_words(pipe, files[name], word)
    adapter = tiny_xl_files["base"]
    pipe.load_ip_adapter(str(adapter.parent), subfolder="", weight_name=adapter.name, image_encoder_folder=None)
    pipe.scheduler = EulerDiscreteScheduler.from_pretrained(tiny_xl_base, subfolder="scheduler")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(oracle: Any, output_type: str = "latent", clip_skip: int | None = 1) -> Any:
    """diffusers' picture of `FIELDS`."""
    request = make_request(**FIELDS)
    oracle.set_ip_adapter_scale(request.ip_adapter_scale)
    # diffusers skips no layers of the negative prompt; we do, as AUTOMATIC1111 does
    (prompt, _, pooled, _), (negative, _, negative_pooled, _) = (
        oracle.encode_prompt(text, None, "cpu", 1, False, clip_skip=clip_skip)
        for text in (request.prompt, request.negative_prompt)
    )
    return oracle(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=negative_pooled,
        ip_adapter_image=request.image,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        height=request.height,
        width=request.width,
        generator=torch.Generator().manual_seed(11),
        output_type=output_type,
    ).images


def test_whole_runs_equal_diffusers(bundle: Path, oracle: Any) -> None:
    request = make_request(**FIELDS)
    with Pipeline.open(bundle, engine="onnxruntime") as pipe:
        for step in pipe.steps(request):
            latents = step.latents
        (picture,) = pipe.run(request).images
    expected = draw(oracle)
    assert_same_latents(latents, expected)
    assert np.abs(np.asarray(picture, int) - np.asarray(draw(oracle, "pil")[0], int)).max() <= 2
    other = draw(oracle, clip_skip=None)
    assert float((other - expected).abs().max() / expected.abs().max()) > 1e-2


def test_validate_repeats_what_the_bundle_records(bundle: Path, files: dict[str, Path], tiny_xl_base: Path) -> None:
    """The files are named without scales and words, in another order."""
    loras = (LoraFile(files["detail"]), LoraFile(files["style"]))
    words = (TextualInversionFile(files["hat"]), TextualInversionFile(files["toy"]))
    changes = BaseChanges(files["config"], None, loras, words)
    image_encoder = str(tiny_xl_base / "image_encoder")
    validator = Validator(bundle, str(files["base"]), image_encoder, (), changes=changes)
    checks = list(islice(validator.run(), 4))
    assert [check.name for check in checks] == ["text_encoder", "text_encoder_2", "text_kv", "unet"]
    assert all(check.passed for check in checks)
    assert "clip skip: 1 layers of both text encoders left out" in run("inspect", bundle).stdout.splitlines()
