"""`--base FILE` and `--vae`: checkpoints in the original layout, converted by diffusers with configurations on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from original_layout import write_checkpoint
from safetensors.torch import load_file, save_file
from tiny import same_weights
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ipa.benchmarks.full_size import CLIP_TEXT_2, FULL_XL
from ipa.engines.bundle import Bundle, hash_file
from ipa.engines.spec import SD15, SDXL
from ipa.export.changes import BaseChanges
from ipa.export.cli import main
from ipa.export.pipeline import BasePipeline
from ipa.export.single_file import CONFIGS


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def config(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline's configurations and tokenizer, no weights, no image encoder."""
    folder = tmp_path_factory.mktemp("config")
    ignored = shutil.ignore_patterns("*.safetensors", "image_encoder")
    return Path(shutil.copytree(tiny_base, folder, ignore=ignored, dirs_exist_ok=True))


@pytest.fixture(scope="module")
def checkpoint(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tiny_base, tmp_path_factory.mktemp("checkpoint") / "model.safetensors")


@pytest.fixture(scope="module")
def xl_checkpoint(tiny_xl_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tiny_xl_base, tmp_path_factory.mktemp("checkpoint") / "xl.safetensors")


def test_a_checkpoint_gives_the_graphs_of_its_pipeline(
    checkpoint: Path, config: Path, tiny_base: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    source = ("--base", checkpoint, "--config", config, "--image-encoder", tiny_base / "image_encoder")
    result = run("onnx", *source, "--output", bundle)
    assert result.exit_code == 0, result.output
    made, expected = Bundle.open(bundle).manifest, Bundle.open(tiny_bundle).manifest
    for name, component in expected.components.items():
        assert made.components[name] == component, name
    assert (made.tokenizer, made.scheduler, made.vae) == (expected.tokenizer, expected.scheduler, expected.vae)
    assert made.sources["checkpoint"].sha256 == hash_file(checkpoint)
    assert f"checkpoint: model.safetensors, sha256 {hash_file(checkpoint)[:16]}" in run("inspect", bundle).stdout
    other = write_checkpoint(tiny_base, tmp_path / "other.safetensors", torch.bfloat16)
    for base, message in ((other, "has sha256"), (tiny_base, "was made with --base model.safetensors")):
        wrong = run("validate", "--bundle", bundle, "--base", base)
        assert (wrong.exit_code, message in wrong.stderr) == (2, True), wrong.output


@pytest.mark.parametrize("family", ["tiny_base", "tiny_xl_base"])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_every_layout_of_a_checkpoint_loads(
    suffix: str, family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Training checkpoints in a pickle with `state_dict`; files in half precision, without `text_model`."""
    folder, file = request.getfixturevalue(family), tmp_path / f"model.{suffix}"
    write_checkpoint(folder, file, torch.float32 if suffix == "ckpt" else torch.float16)
    expected = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    if suffix == "safetensors":
        state = {name.replace("transformer.text_model.", "transformer."): t for name, t in load_file(file).items()}
        prefix = next(name for name in state if ".token_embedding" in name).rpartition("token_embedding")[0]
        save_file({**state, f"{prefix}position_ids": torch.arange(77)[None]}, file)
        expected.to(torch.float16).to(torch.float32)
    base = BasePipeline(str(file), str(folder / "image_encoder"), BaseChanges(config=folder))
    same_weights(base.load_unet(), expected.unet)
    same_weights(base.load_vae(), expected.vae)
    same_weights(base.load_text_encoder(), expected.text_encoder)
    if family == "tiny_xl_base":
        same_weights(base.load_text_encoder_2(), expected.text_encoder_2)


# Parameter counts as published: UNet, VAE, text encoders.
PARAMETERS = {
    SD15: [859_520_964, 83_653_863, 123_060_480],
    SDXL: [2_567_463_684, 83_653_863, 123_060_480, 694_659_840],
}


@pytest.mark.parametrize("family", PARAMETERS)
def test_the_shipped_configurations_are_those_published(family: str) -> None:
    folder = CONFIGS[family]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        models: list[Any] = [unet, vae, CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))]
        if family == SDXL:
            config = CLIPTextConfig.from_pretrained(folder / "text_encoder_2")
            models.append(CLIPTextModelWithProjection(config))
    assert [sum(p.numel() for p in model.parameters()) for model in models] == PARAMETERS[family]
    assert [model.config.hidden_act for model in models[2:]] == ["quick_gelu", "gelu"][: len(models) - 2]


def test_the_shipped_configurations_of_xl_are_those_of_the_full_size(tiny_xl_base: Path) -> None:
    """What parameter counts do not tell: heads, the scheduler, the VAE's factor and precision."""
    folder = CONFIGS[SDXL]
    unet = UNet2DConditionModel.load_config(folder / "unet")
    assert {name: unet[name] for name in FULL_XL.unet} == {
        name: list(value) if isinstance(value, tuple) else value for name, value in FULL_XL.unet.items()
    }
    shipped, expected = (
        {
            name: value
            for name, value in EulerDiscreteScheduler.from_pretrained(pipeline / "scheduler").config.items()
            if not name.startswith("_")
        }
        for pipeline in (folder, tiny_xl_base)
    )
    assert shipped == expected
    text = CLIPTextConfig.from_pretrained(folder / "text_encoder_2").to_dict()
    assert {name: text[name] for name in CLIP_TEXT_2} == CLIP_TEXT_2


# As openai/clip-vit-large-patch14 gives; XL's second tokenizer pads with "!".
IDS = [49406, 320, 1125, 539, 320, 2368, 49407]


def test_the_shipped_tokenizers_are_clip_s(checkpoint: Path, xl_checkpoint: Path, tiny_base: Path) -> None:
    image_encoder = str(tiny_base / "image_encoder")
    base, xl = BasePipeline(str(checkpoint), image_encoder), BasePipeline(str(xl_checkpoint), image_encoder)
    for pipeline, part, padding in ((base, "tokenizer", 49407), (xl, "tokenizer", 49407), (xl, "tokenizer_2", 0)):
        tokenizer = pipeline.load_tokenizer(part)
        assert tokenizer.encode("a photo of a cat").ids == IDS + [padding] * 70
        assert tokenizer.get_vocab_size() == 49408
    assert (xl.family, xl.defaults.height, xl.vae_record.scaling_factor) == (SDXL, 1024, 0.13025)
    assert xl.needs_float32_vae
    assert xl.force_zeros_for_empty_prompt


class Code:
    def __reduce__(self) -> Any:
        return print, ("this ran",)


def without(prefix: str, file: Path, source: Path) -> Path:
    save_file({name: tensor for name, tensor in load_file(source).items() if not name.startswith(prefix)}, file)
    return file


def with_shape(name: str, shape: tuple[int, ...], file: Path, source: Path) -> Path:
    save_file({**load_file(source), name: torch.zeros(shape)}, file)
    return file


def pickled(file: Path) -> Path:
    torch.save({"state_dict": {"x": Code()}}, file)
    return file


def cut(file: Path, source: Path) -> Path:
    file.write_bytes(source.read_bytes()[:5000])
    return file


BAD_FILES: dict[str, tuple[Any, str]] = {
    "missing": (lambda folder, _: folder / "no.safetensors", "no such file"),
    "pickle": (lambda folder, _: pickled(folder / "x.ckpt"), "would run code when loaded"),
    "cut": (lambda folder, file: cut(folder / "x.safetensors", file), "not readable"),
    "adapter": (
        lambda folder, file: without("", folder / "x.safetensors", file),
        "no model.diffusion_model.input_blocks",
    ),
    "no vae": (lambda folder, file: without("first_stage", folder / "x.safetensors", file), "no vae weights; name one"),
    "no text": (lambda folder, file: without("cond_", folder / "x.safetensors", file), "no text_encoder weights"),
    "inpainting": (
        lambda folder, file: with_shape(
            "model.diffusion_model.input_blocks.0.0.weight", (24, 9, 3, 3), folder / "x.safetensors", file
        ),
        "is an inpainting model, which is not supported",
    ),
    "xl": (
        lambda folder, file: with_shape(
            "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
            (1,),
            folder / "x.safetensors",
            file,
        ),
        "is Stable Diffusion XL, the configurations in",
    ),
    "a missing weight": (
        lambda folder, file: without(
            "cond_stage_model.transformer.text_model.final_layer_norm", folder / "x.safetensors", file
        ),
        "it misses final_layer_norm",
    ),
    "other sizes": (
        lambda folder, file: with_shape(
            "cond_stage_model.transformer.text_model.final_layer_norm.bias", (7,), folder / "x.safetensors", file
        ),
        "--config DIR",
    ),
}


XL_BAD_FILES: dict[str, tuple[Any, str]] = {
    "refiner": (
        lambda file, source: with_shape("conditioner.embedders.0.model.ln_final.bias", (1,), file, source),
        "is a refiner of Stable Diffusion XL, which is not supported",
    ),
    "inpainting": (
        lambda file, source: with_shape("model.diffusion_model.input_blocks.0.0.weight", (24, 9, 3, 3), file, source),
        "is an inpainting model, which is not supported",
    ),
    "playground": (lambda file, source: with_shape("edm_mean", (4,), file, source), "is Playground v2.5"),
    "predicts v": (lambda file, source: with_shape("v_pred", (0,), file, source), "predicts v (it has v_pred)"),
    "one text encoder": (
        lambda file, source: without("conditioner.embedders.1.", file, source),
        "has no text_encoder_2 weights; use a complete checkpoint",
    ),
    "a missing weight": (
        lambda file, source: without("conditioner.embedders.1.model.text_projection", file, source),
        "cannot load the text_encoder_2 of",
    ),
}


@pytest.mark.parametrize("case", XL_BAD_FILES)
def test_refuses_a_checkpoint_of_xl(case: str, xl_checkpoint: Path, tiny_xl_base: Path, tmp_path: Path) -> None:
    make, message = XL_BAD_FILES[case]
    file = make(tmp_path / "x.safetensors", xl_checkpoint)
    source = ("--base", file, "--config", tiny_xl_base, "--image-encoder", tiny_xl_base / "image_encoder")
    result = run("onnx", *source, "--output", tmp_path / "out")
    assert result.exit_code == 2, result.output
    *progress, last = result.stderr.splitlines()
    assert message in last
    assert progress == (["export text_encoder"] if case == "a missing weight" else [])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses_a_checkpoint(case: str, checkpoint: Path, config: Path, tiny_base: Path, tmp_path: Path) -> None:
    make, message = BAD_FILES[case]
    source = ("--base", make(tmp_path, checkpoint), "--config", config)
    result = run("onnx", *source, "--image-encoder", tiny_base / "image_encoder", "--output", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert "this ran" not in result.output  # where `print` ends up


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "{checkpoint}"], "pass --image-encoder"),
        (["--base", "{base}", "--config", "{base}"], "--config goes with a checkpoint file"),
        (["--base", "{base}", "--vae", "{base}/nothing"], "neither a folder nor"),
        (["--base", "{base}", "--vae", "{base}/nothing.safetensors"], "no such file"),
        (["--base", "{base}", "--vae", "{base}/scheduler"], "has no config.json"),
        (["--base", "{base}", "--vae", "{base}/unet"], "is a UNet2DConditionModel"),
        (["--base", "{base}", "--vae", "{base}/unet/diffusion_pytorch_model.safetensors"], "no encoder.*"),
    ],
)
def test_refuses_options(arguments: list[str], message: str, checkpoint: Path, tiny_base: Path, tmp_path: Path) -> None:
    filled = (text.format(checkpoint=checkpoint, base=tiny_base) for text in arguments)
    result = run("onnx", *filled, "--output", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_a_vae_takes_another(
    checkpoint: Path, config: Path, other_vae: Path, tiny_base: Path, tmp_path: Path
) -> None:
    file = without("first_stage_model.", tmp_path / "pruned.safetensors", checkpoint)
    changes = BaseChanges(config=config, vae=str(other_vae))
    base = BasePipeline(str(file), str(tiny_base / "image_encoder"), changes)
    same_weights(base.load_vae(), AutoencoderKL.from_pretrained(other_vae))
