"""`--textual-inversion`, `--clip-skip` and all changes at once, against diffusers' own pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from original_layout import write_checkpoint
from safetensors.torch import load_file, save_file
from test_export_lora import write_lora
from tiny import TEXT_WIDTH
from tiny_xl import TEXT_WIDTHS

from ipa.engines.bundle import Bundle
from ipa.engines.manifest import FILE_NAME, Manifest
from ipa.engines.spec import ONE_SLOT
from ipa.export.changes import BaseChanges, parse_textual_inversion
from ipa.export.cli import main
from ipa.export.graphs import component_modules
from ipa.export.lora import LoraFile
from ipa.export.pipeline import BasePipeline
from ipa.export.textual_inversion import TextualInversionFile
from ipa.export.validate import Validator
from ipa.runtime import Pipeline, Request
from ipa.runtime.tokenizer import Tokenizer

# Random text encoders of two layers: the same float32 sums in the same order, but for the attention's kernel.
TOLERANCE = 1e-5


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def pipeline(base: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    # diffusers 0.42 asks for `text_model` when layers are skipped; transformers 5.6 put its contents one level up.
    object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def xl_pipeline(base: Path) -> Any:
    pipe = StableDiffusionXLPipeline.from_pretrained(base, local_files_only=True, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_words(pipe: Any, file: Path, word: str) -> None:
    """Load a file of Stable Diffusion XL as diffusers' documentation does, one encoder after the other."""
    state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    pipe.load_textual_inversion(state["clip_l"], word, pipe.tokenizer, pipe.text_encoder)
    pipe.load_textual_inversion(state["clip_g"], word, pipe.tokenizer_2, pipe.text_encoder_2)


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def saved(state: dict[str, torch.Tensor], file: Path) -> Path:
    save_file(state, file)
    return file


def pickled(content: object, file: Path) -> Path:
    torch.save(content, file)
    return file


def a1111(tensor: torch.Tensor, name: str) -> dict[str, Any]:
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": tensor}, "name": name, "step": 100}


LAYOUTS: dict[str, tuple[Callable[[Path], Path], str | None, int]] = {
    "diffusers": (lambda folder: saved({"<cat-toy>": vectors(1)[0]}, folder / "x.safetensors"), None, 1),
    "several vectors": (lambda folder: saved({"toy": vectors(3)}, folder / "x.safetensors"), None, 3),
    "pickle": (lambda folder: pickled({"<toy>": vectors(2)}, folder / "learned_embeds.bin"), None, 2),
    "a1111": (lambda folder: pickled(a1111(vectors(2), "style"), folder / "x.pt"), None, 2),
    "a1111 renamed": (lambda folder: pickled(a1111(vectors(2), "style"), folder / "x.pt"), "<mine>", 2),
    "half precision": (lambda folder: saved({"toy": vectors(2).half()}, folder / "x.safetensors"), None, 2),
    "a1111 safetensors": (lambda folder: saved({"emb_params": vectors(2)}, folder / "word.safetensors"), "word", 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompt_embeddings_equal_diffusers(layout: str, tiny_base: Path, tmp_path: Path) -> None:
    make, token, count = LAYOUTS[layout]
    file = make(tmp_path)
    theirs = pipeline(tiny_base)
    theirs.load_textual_inversion(str(tmp_path), weight_name=file.name, token=token)
    given = None if layout == "a1111 safetensors" else token  # the file's name is its word
    ours = BasePipeline(str(tiny_base), None, BaseChanges(textual_inversions=(TextualInversionFile(file, given),)))
    (record,) = ours.textual_inversions
    assert record.vectors == count
    tokenizer, encoder = Tokenizer(ours.load_tokenizer(), 77), ours.load_text_encoder()
    word = record.token
    for prompt in ("a cat", word, f"a photo of {word}, {word} on the grass", f"{word} " * 40):
        ids = torch.from_numpy(tokenizer.encode(prompt).ids)[None]
        expected = theirs.encode_prompt(prompt, "cpu", 1, False)[0]
        with torch.no_grad():
            found = encoder(ids).last_hidden_state
        assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE, prompt


def test_a_word_with_capitals_stands_for_all_its_vectors(tiny_base: Path, tmp_path: Path) -> None:
    """diffusers with today's tokenizers takes the first vector alone; the rest is what the file's author trained."""
    file = saved({"<MyStyle>": vectors(3)}, tmp_path / "x.safetensors")
    base = BasePipeline(str(tiny_base), None, BaseChanges(textual_inversions=(TextualInversionFile(file),)))
    first = base.text_config["vocab_size"] - 3
    for prompt in ("a <MyStyle> cat", "A <mystyle> CAT"):
        ids = Tokenizer(base.load_tokenizer(), 77).encode(prompt).ids
        assert list(ids[2:5]) == [first, first + 1, first + 2]


def test_what_is_cut_off_starts_at_a_word(tiny_base: Path, tmp_path: Path) -> None:
    file = saved({"toy": vectors(4)}, tmp_path / "x.safetensors")
    base = BasePipeline(str(tiny_base), None, BaseChanges(textual_inversions=(TextualInversionFile(file),)))
    tokenizer = Tokenizer(base.load_tokenizer(), 77)
    assert tokenizer.encode("cat " * 71 + "toy").cut == ""
    assert tokenizer.encode("cat " * 72 + "toy dog").cut == "toy dog"


class Code:
    def __reduce__(self) -> Any:
        return print, ("this ran",)


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "no.pt", "no such file"),
    "pickle": (lambda folder: pickled({"x": Code()}, folder / "x.pt"), "would run code when loaded"),
    "xl": (
        lambda folder: saved({"clip_l": vectors(1), "clip_g": vectors(1)}, folder / "x.safetensors"),
        "is for Stable Diffusion XL",
    ),
    "another width": (
        lambda folder: saved({"<toy>": torch.zeros(1, 1024)}, folder / "x.safetensors"),
        "is for a text encoder of width 1024, this base model's has 48",
    ),
    "no word": (lambda folder: pickled(vectors(1), folder / "x.pt"), "does not say its word"),
    "known word": (lambda folder: saved({"A": vectors(1)}, folder / "x.safetensors"), "knows 'A' already"),
    "blank word": (lambda folder: saved({" ": vectors(1)}, folder / "x.safetensors"), "cannot be a word"),
    "lora": (
        lambda folder: saved({"a": vectors(1), "b": vectors(1)}, folder / "x.safetensors"),
        "neither diffusers' layout",
    ),
    "nan": (
        lambda folder: saved({"<toy>": vectors(1) * float("nan")}, folder / "x.safetensors"),
        "no rows of finite numbers",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_a_textual_inversion(case: str, tiny_base: Path, tmp_path: Path) -> None:
    make, message = BAD[case]
    file, output = make(tmp_path), tmp_path / "out"
    result = run("onnx", "--base", tiny_base, "--textual-inversion", file, "--output", output)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not output.exists()
    assert "this ran" not in result.output  # where `print` ends up


def test_the_same_word_twice_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    files = [saved({"toy": vectors(2, seed)}, tmp_path / f"{seed}.safetensors") for seed in (0, 1)]
    options = ("--textual-inversion", files[0], "--textual-inversion", files[1])
    result = run("onnx", "--base", tiny_base, *options, "--output", tmp_path / "out")
    assert (result.exit_code, "knows 'toy' already" in result.stderr) == (2, True), result.output


def test_a_word_follows_the_first_equals_sign() -> None:
    assert parse_textual_inversion("a.pt") == TextualInversionFile(Path("a.pt"))
    assert parse_textual_inversion("a.pt=<x=y>") == TextualInversionFile(Path("a.pt"), "<x=y>")


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_clip_skip_equals_diffusers(clip_skip: int, tiny_base: Path) -> None:
    theirs, base = pipeline(tiny_base), BasePipeline(str(tiny_base), None, BaseChanges(clip_skip=clip_skip))
    expected = theirs.encode_prompt("a cat", "cpu", 1, False, clip_skip=clip_skip)[0]
    ids = torch.from_numpy(Tokenizer(base.load_tokenizer(), 77).encode("a cat").ids)[None]
    with torch.no_grad():
        found = base.load_text_encoder()(ids).last_hidden_state
    assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE


def xl_vectors(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = zip(("clip_l", "clip_g"), TEXT_WIDTHS, strict=True)
    return {name: torch.randn(count, width, generator=generator) for name, width in both}


XL_BAD: dict[str, tuple[Any, str]] = {
    "one encoder": ({"<toy>": vectors(1)}, "expected the tensors clip_l (rows of 24) and clip_g (rows of 40)"),
    "clip_l alone": ({"clip_l": xl_vectors(1)["clip_l"]}, "has no clip_g; Stable Diffusion XL has two text encoders"),
    "another width": (xl_vectors(1) | {"clip_g": torch.zeros(1, 48)}, "of width 48, this base model's has 40"),
    "another count": (xl_vectors(2) | {"clip_g": torch.zeros(1, 40)}, "clip_l and clip_g have 2 and 1 rows"),
    "nan": (xl_vectors(1) | {"clip_g": torch.full((1, 40), float("nan"))}, "no rows of finite numbers"),
}


@pytest.mark.parametrize("case", XL_BAD)
def test_refuses_a_textual_inversion_for_xl(case: str, tiny_xl_base: Path, tmp_path: Path) -> None:
    state, message = XL_BAD[case]
    file = saved(state, tmp_path / "x.safetensors")
    result = run("onnx", "--base", tiny_xl_base, "--textual-inversion", file, "--output", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert f"textual inversion {file}" in result.stderr
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_the_text_of_xl_equals_diffusers(clip_skip: int, tiny_xl_base: Path, tmp_path: Path) -> None:
    """Words of one and of three vectors, layers left out, and the pooled text, which has them all."""
    pickled({name: tensor[0] for name, tensor in xl_vectors(1).items()}, tmp_path / "hat.pt")
    saved({name: tensor.half() for name, tensor in xl_vectors(3, seed=1).items()}, tmp_path / "toy.safetensors")
    theirs = xl_pipeline(tiny_xl_base)
    words = {"<hat>": tmp_path / "hat.pt", "toy": tmp_path / "toy.safetensors"}
    for word, file in words.items():
        load_words(theirs, file, word)
    inversions = (TextualInversionFile(words["<hat>"], "<hat>"), TextualInversionFile(words["toy"]))
    base = BasePipeline(str(tiny_xl_base), None, BaseChanges(textual_inversions=inversions, clip_skip=clip_skip))
    assert [(record.token, record.vectors) for record in base.textual_inversions] == [("<hat>", 1), ("toy", 3)]
    encoders = [module for _, module in islice(component_modules(base, ONE_SLOT), 2)]
    tokenizers = [Tokenizer(base.load_tokenizer(part), 77) for part in ("tokenizer", "tokenizer_2")]
    for prompt in ("a cat!", "a photo of toy with <hat> on the grass"):
        ids = [torch.from_numpy(tokenizer.encode(prompt).ids)[None] for tokenizer in tokenizers]
        with torch.no_grad():
            first, (second, pooled) = (encoder(each) for encoder, each in zip(encoders, ids, strict=True))
            states, _, text_embeds, _ = theirs.encode_prompt(prompt, None, "cpu", 1, False, clip_skip=clip_skip or None)
        for found, expected in ((torch.cat([first, second], dim=-1), states), (pooled, text_embeds)):
            assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE, prompt


@pytest.mark.parametrize("clip_skip", ["-1", "2", "1.5"])
def test_refuses_a_clip_skip(clip_skip: str, tiny_base: Path, tmp_path: Path) -> None:
    result = run("onnx", "--base", tiny_base, "--clip-skip", clip_skip, "--output", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert "--clip-skip" in result.stderr


@pytest.fixture(scope="module")
def files(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Everything that a base model can be made of."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(5)
    options = AutoencoderKL.load_config(tiny_base / "vae")
    AutoencoderKL.from_config({**options, "scaling_factor": 0.5}).save_pretrained(folder / "vae")
    ignored = shutil.ignore_patterns("*.safetensors", "image_encoder")
    return {
        "base": write_checkpoint(tiny_base, folder / "model.safetensors"),
        "config": Path(shutil.copytree(tiny_base, folder / "config", ignore=ignored)),
        "vae": folder / "vae",
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
    assert np.abs(latents - expected).max() / np.abs(expected).max() < 1e-3
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
