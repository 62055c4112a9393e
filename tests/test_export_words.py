"""Textual inversion and clip skip against diffusers, and what is refused of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from words import a1111, load_words, pickled, pipeline, saved, vectors, xl_pipeline, xl_vectors

from ipa.engines.spec import ONE_SLOT
from ipa.export.changes import BaseChanges, parse_textual_inversion
from ipa.export.cli import main
from ipa.export.graphs import component_modules
from ipa.export.pipeline import BasePipeline
from ipa.export.textual_inversion import TextualInversionFile
from ipa.runtime.tokenizer import Tokenizer

TOLERANCE = 1e-5


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


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
