"""`--textual-inversion`, `--clip-skip` and all changes at once, against diffusers' own pipeline."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL, DDIMScheduler
from lora_files import write_lora
from original_layout import write_checkpoint
from parity import assert_same_latents
from tiny import another_vae
from words import a1111, pickled, pipeline, saved, vectors

from ipa.engines.bundle import Bundle
from ipa.engines.manifest import FILE_NAME, Manifest
from ipa.export.changes import BaseChanges
from ipa.export.cli import main
from ipa.export.lora import LoraFile
from ipa.export.textual_inversion import TextualInversionFile
from ipa.export.validate import Validator
from ipa.runtime import Pipeline, Request

TOLERANCE = 1e-5


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def files(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Everything that a base model can be made of."""
    folder = tmp_path_factory.mktemp("files")
    ignored = shutil.ignore_patterns("*.safetensors", "image_encoder")
    return {
        "base": write_checkpoint(tiny_base, folder / "model.safetensors"),
        "config": Path(shutil.copytree(tiny_base, folder / "config", ignore=ignored)),
        "vae": another_vae(tiny_base, folder / "vae"),
        "style": write_lora(tiny_base, folder / "style"),
        "detail": write_lora(tiny_base, folder / "detail", seed=1, with_metadata=True),
        "toy": saved({"<toy>": vectors(3)}, folder / "toy.safetensors"),
        "hat": pickled(a1111(vectors(1, seed=1), "hat"), folder / "hat.pt"),
    }


@pytest.fixture(scope="module")
def named(files: dict[str, Path], tiny_base: Path) -> list[object]:
    """Options of the files, without weights and words."""
    options = [("--base", files["base"]), ("--config", files["config"]), ("--vae", files["vae"])]
    options += [("--image-encoder", tiny_base / "image_encoder")]
    return [part for option in options for part in option]


@pytest.fixture(scope="module")
def bundle(
    files: dict[str, Path], named: list[object], tiny_adapter_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("bundle") / "bundle"
    loras = ("--lora", f"{files['style']}=0.8", "--lora", f"{files['detail']}=-0.4")
    words = ("--textual-inversion", files["toy"], "--textual-inversion", f"{files['hat']}=<hat>")
    adapter = ("--adapter", f"tiny={tiny_adapter_file}")
    result = run("onnx", *named, *loras, *words, *adapter, "--clip-skip", 1, "--output", output)
    assert result.exit_code == 0, result.output
    return output


def test_whole_runs_equal_diffusers(
    bundle: Path, files: dict[str, Path], tiny_base: Path, tiny_adapter_file: Path
) -> None:
    theirs = pipeline(tiny_base)
    theirs.vae = AutoencoderKL.from_pretrained(files["vae"])
    for name, scale in (("style", 0.8), ("detail", -0.4)):
        theirs.load_lora_weights(files[name].parent, weight_name=files[name].name)
        theirs.fuse_lora(lora_scale=scale)
        theirs.unload_lora_weights()
    for name, token in (("toy", None), ("hat", "<hat>")):
        theirs.load_textual_inversion(str(files[name].parent), weight_name=files[name].name, token=token)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    request = Request(
        prompt="a <toy> cat with <hat> on the grass",
        negative_prompt="<hat>, red dog",
        num_inference_steps=4,
        guidance_scale=6.0,
        seed=11,
        height=64,
        width=72,
        scheduler="ddim",
    )

    def draw(output_type: str, clip_skip: int | None = 1) -> Any:
        # diffusers skips no layers of the negative prompt; we do, as AUTOMATIC1111 does
        prompt, negative = (
            theirs.encode_prompt(text, "cpu", 1, False, clip_skip=clip_skip)[0]
            for text in (request.prompt, request.negative_prompt)
        )
        return theirs(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            num_inference_steps=4,
            guidance_scale=6.0,
            height=64,
            width=72,
            generator=torch.Generator().manual_seed(11),
            output_type=output_type,
        ).images

    expected = draw("latent").numpy()
    with Pipeline.open(bundle, engine="onnxruntime") as pipe:
        for step in pipe.steps(request):
            latents = step.latents
        (picture,) = pipe.run(request).images
    assert_same_latents(latents, expected)
    assert np.abs(np.asarray(picture, int) - np.asarray(draw("pil")[0], int)).max() <= 2
    assert np.abs(draw("latent", clip_skip=None).numpy() - expected).max() / np.abs(expected).max() > 0.01


def test_validate_repeats_what_the_bundle_records(
    bundle: Path, files: dict[str, Path], named: list[object], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))

    def validate(loras: list[object], words: list[object]) -> Any:
        options = [part for lora in loras for part in ("--lora", lora)]
        options += [part for word in words for part in ("--textual-inversion", word)]
        return run("validate", "--bundle", copy, *named, *options)

    style, detail, toy, hat = (files[name] for name in ("style", "detail", "toy", "hat"))
    result = validate([detail, style], [hat, toy])  # in another order, without weights and words
    assert result.exit_code == 0, result.output
    assert Bundle.open(copy).manifest.validation["passed"] is True
    for loras, words, message in (
        ([style, detail], [hat], "was made with --textual-inversion toy.safetensors (sha256 "),
        ([style], [hat, toy], "was made with --lora pytorch_lora_weights.safetensors (sha256 "),
        ([style, f"{detail}=0.5"], [hat, toy], "was made with --lora pytorch_lora_weights.safetensors=-0.4, not 0.5"),
        ([style, detail], [hat, f"{toy}=x"], "was made with --textual-inversion toy.safetensors=<toy>, not x"),
        ([style, detail, toy], [hat, toy], "is not in the bundle; leave --lora"),
        (["no.safetensors"], [], "no.safetensors: no such file"),
    ):
        result = validate(loras, words)
        assert (result.exit_code, message in result.stderr) == (2, True), result.output


def test_validate_finds_another_scale_and_clip_skip(
    bundle: Path, files: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    text = (copy / FILE_NAME).read_text()
    changes = BaseChanges(
        files["config"],
        str(files["vae"]),
        (LoraFile(files["detail"]), LoraFile(files["style"])),
        (TextualInversionFile(files["hat"]), TextualInversionFile(files["toy"])),
    )
    for old, new, wrong in (
        ('"scale": 0.8', '"scale": 0.81', ["text_encoder", "text_kv", "unet"]),
        ('"clip_skip": 1', '"clip_skip": 0', ["text_encoder"]),
    ):
        assert text.count(old) == 1
        (copy / FILE_NAME).write_text(text.replace(old, new))
        validator = Validator(copy, str(files["base"]), str(tiny_base / "image_encoder"), (), changes=changes)
        components = list(islice(validator.run(), 4))
        assert [check.name for check in components if not check.passed] == wrong


def test_validate_asks_for_the_vae(bundle: Path, tiny_base: Path, files: dict[str, Path], tiny_bundle: Path) -> None:
    base = ("--base", files["base"], "--config", files["config"], "--image-encoder", tiny_base / "image_encoder")
    result = run("validate", "--bundle", bundle, *base)
    assert (result.exit_code, "was made with --vae vae; name it again" in result.stderr) == (2, True), result.output
    result = run("validate", "--bundle", tiny_bundle, "--base", tiny_base, "--vae", files["vae"])
    assert (result.exit_code, "was made without --vae" in result.stderr) == (2, True), result.output


def test_inspect_shows_the_changes(bundle: Path) -> None:
    lines = run("inspect", bundle).stdout.splitlines()
    for start in (
        "checkpoint: model.safetensors, sha256 ",
        "vae: vae",
        "lora: pytorch_lora_weights.safetensors x 0.8, sha256 ",
        "lora: pytorch_lora_weights.safetensors x -0.4, sha256 ",
        "textual inversion: <toy>, 3 tokens, of toy.safetensors, sha256 ",
        "textual inversion: <hat>, 1 tokens, of hat.pt, sha256 ",
        "clip skip: 1 layers of the text encoder left out",
    ):
        assert any(line.startswith(start) for line in lines), start


def test_bundles_of_before_still_open(tiny_bundle: Path) -> None:
    text = (tiny_bundle / FILE_NAME).read_text()
    old = text.replace('"sources"', '"_1"').replace('"loras"', '"_2"')
    old = old.replace('"textual_inversions"', '"_3"').replace('"clip_skip"', '"_4"')
    assert old != text
    assert Manifest.from_json(old) == Manifest.from_json(text)


def test_build_engines_takes_them_with_base(bundle: Path, files: dict[str, Path]) -> None:
    for options in (("--lora", files["style"]), ("--vae", files["vae"]), ("--clip-skip", 1)):
        result = run("build-engines", "--bundle", bundle, "--engine", "tensorrt-rtx", *options)
        assert (result.exit_code, f"{options[0]} goes with --base" in result.stderr) == (2, True), result.output


def test_build_engines_hands_them_to_the_export(tiny_base: Path, tmp_path: Path) -> None:
    command = ("build-engines", "--base", tiny_base, "--output", tmp_path / "out", "--engine", "tensorrt-rtx")
    result = run(*command, "--cache", tmp_path / "cache", "--lora", tmp_path / "no.safetensors")
    assert (result.exit_code, "lora" in result.stderr and "no such file" in result.stderr) == (2, True), result.output


def test_never_writes_over_a_lora(bundle: Path, tiny_base: Path, files: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    lora = Path(shutil.copy(files["style"], copy / "lora.safetensors"))
    result = run("onnx", "--base", tiny_base, "--lora", lora, "--output", copy, "--force")
    assert (result.exit_code, f"would replace {lora}" in result.stderr) == (2, True), result.output
    assert lora.exists()
