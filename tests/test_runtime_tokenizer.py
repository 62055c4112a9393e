"""Prompts to ids, against transformers' `CLIPTokenizer` on a small vocabulary of the same kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from ipa.engines.errors import BundleError, RequestError
from ipa.runtime.tokenizer import MAX_CHARACTERS, Encoding, Tokenizer

transformers = pytest.importorskip("transformers")

LENGTH = 77
CORPUS = [
    "a red circle on a blue background with stripes and dots, highly detailed photo of a cat",
    "the quick brown fox doesn't jump over the lazy dog's house; it's 1234567890 o'clock!",
    "une forêt enchantée à l'aube, größe straße, кошка на столе, 猫が好き",
]

PROMPTS = [
    "",
    " ",
    "a",
    "a red circle",
    "A RED Circle",
    "  leading,  double   spaces \t tabs\nand\r\nlines  ",
    "don't can't we've I'll he'd it's you're I'm 'quoted' O'Brien's",
    "(masterpiece:1.2), [[best]] {quality}, 8k!!! ... --ar 16:9 <lora:x:0.8>",
    "naïve café Ångström ﬁne ½ ² Ⅳ",
    "nai\u0308ve cafe\u0301",  # combining marks: NFC joins them
    "猫が好き、東京タワー 한국어 العربية עברית हिन्दी",
    "🐱 emoji 👩‍👩‍👧‍👦 family 🇩🇪 flag ❤️",
    "İstanbul ẞ ΑΣ",  # lower-casing that changes lengths
    "x" * 300,
    'under_score snake_case-kebab a/b\\c "q" 50% $5 #tag @you',
    "\u00a0no-break\u2003em\u3000wide\u200bzero\ufeffbom",
    "\x01control\x7f",
    "<|startoftext|> special <|endoftext|> inside",
    "1234567890 3.14 1,000",
    " ".join(f"word{i}" for i in range(500)),
    " ".join(["red"] * 75),
    " ".join(["red"] * 76),
]


@pytest.fixture(scope="module")
def oracle() -> Any:
    """transformers' CLIP tokenizer over a vocabulary trained on `CORPUS`."""
    plain = transformers.CLIPTokenizer().backend_tokenizer
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    backend.normalizer, backend.pre_tokenizer = plain.normalizer, plain.pre_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, end_of_word_suffix="</w>", show_progress=False, initial_alphabet=_alphabet()
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    model = json.loads(backend.to_str())["model"]
    # Every byte also as the end of a word, as in OpenAI's vocabulary: else unseen ones would be unknown.
    tokens = list(model["vocab"]) + [f"{byte}</w>" for byte in _alphabet()]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(pair) for pair in model["merges"]]
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def _alphabet() -> list[str]:
    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="module")
def path(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    oracle.save_pretrained(folder)
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.open(path, LENGTH)


def expected_ids(oracle: Any, text: str, length: int = LENGTH) -> np.ndarray:
    ids = oracle(text, padding="max_length", max_length=length, truncation=True).input_ids
    return np.array(ids, dtype=np.int64)


@pytest.mark.parametrize("text", PROMPTS)
def test_ids_equal_transformers(oracle: Any, tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids.dtype == np.int64 and ids.shape == (LENGTH,)
    np.testing.assert_array_equal(ids, expected_ids(oracle, text))


def test_ids_equal_transformers_on_random_text(oracle: Any, tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    ranges = [(1, 0x80), (0x80, 0x250), (0x370, 0x2100), (0x3000, 0x9FFF), (0x1F300, 0x1FAFF), (0xE000, 0x10FFFF)]
    for _ in range(300):
        low, high = ranges[rng.integers(len(ranges))]
        text = "".join(map(chr, rng.integers(low, high, rng.integers(1, 60))))
        text = "".join(character for character in text if not "\ud800" <= character <= "\udfff")
        np.testing.assert_array_equal(tokenizer.encode(text).ids, expected_ids(oracle, text), err_msg=ascii(text))


def test_the_vocabulary_of_these_tests_has_merges_and_no_unknowns(oracle: Any, tokenizer: Tokenizer) -> None:
    """A vocabulary of single bytes, or one that gives EOS for what it does not know, would prove little."""
    assert len(oracle.tokenize("red circle")) < len("redcircle") / 2
    end = oracle.eos_token_id
    assert (tokenizer.encode("猫 qzx").ids[1:6] != end).all()


def test_empty_prompt_is_start_end_and_padding(oracle: Any, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("").ids
    assert ids[0] == oracle.bos_token_id and (ids[1:] == oracle.eos_token_id).all()


@pytest.mark.parametrize("length", [8, 77])
def test_short_models_are_cut_at_their_own_length(oracle: Any, path: Path, length: int) -> None:
    text = "a red circle on a blue background " * 30
    encoding = Tokenizer.open(path, length).encode(text)
    np.testing.assert_array_equal(encoding.ids, expected_ids(oracle, text, length))


# --- what was cut off -----------------------------------------------------------------------------


def test_nothing_is_cut_up_to_75_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(" ".join(["red"] * 75)).cut == ""
    assert tokenizer.encode(" ".join(["red"] * 75) + " Circle").cut == "Circle"


def test_cut_is_the_rest_of_the_prompt_as_written(oracle: Any, tokenizer: Tokenizer) -> None:
    text = "A Red,  circle\n" * 20 + "É 🐱 Ende"
    encoding = tokenizer.encode(text)
    assert text.endswith(encoding.cut) and encoding.cut.endswith("É 🐱 Ende")
    kept = text[: len(text) - len(encoding.cut)]
    np.testing.assert_array_equal(tokenizer.encode(kept).ids, encoding.ids)
    assert tokenizer.encode(kept).cut == ""


def test_cut_of_500_words(tokenizer: Tokenizer) -> None:
    words = ["red"] * 75 + [f"word{i}" for i in range(425)]
    assert tokenizer.encode(" ".join(words)).cut == " ".join(words[75:])


# --- padding --------------------------------------------------------------------------------------


def test_padding_and_truncation_in_the_file_do_not_change_the_ids(oracle: Any, path: Path, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.enable_truncation(5)
    backend.enable_padding(pad_id=oracle.pad_token_id, pad_token=oracle.pad_token, length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    encoding = Tokenizer.open(tmp_path / "tokenizer.json", LENGTH).encode(PROMPTS[6])
    np.testing.assert_array_equal(encoding.ids, expected_ids(oracle, PROMPTS[6]))
    assert encoding.cut == ""


def test_another_padding_token_is_read_from_the_file(oracle: Any, path: Path, tmp_path: Path) -> None:
    """SD2.1 pads with "!", id 0."""
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.enable_padding(pad_id=0, pad_token="!")
    backend.save(str(tmp_path / "tokenizer.json"))
    ids = Tokenizer.open(tmp_path / "tokenizer.json", LENGTH).encode("red").ids
    assert ids[2] == oracle.eos_token_id and (ids[3:] == 0).all()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a\0b", "half \ud83d emoji", "\udcff"])
def test_characters_that_are_no_text_are_refused(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(RequestError, match=r"U\+(0000|D83D|DCFF)") as caught:
        tokenizer.encode(text)
    str(caught.value).encode()  # the message itself can be printed


def test_a_file_passed_as_a_prompt_is_refused(tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer.encode("a " * (MAX_CHARACTERS // 2)), Encoding)
    with pytest.raises(RequestError, match=f"{MAX_CHARACTERS + 1} characters"):
        tokenizer.encode("a" * (MAX_CHARACTERS + 1))


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_broken_file_is_a_bundle_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="export the bundle again") as caught:
        Tokenizer.open(path, LENGTH)
    assert str(path) in str(caught.value)


def test_missing_file_is_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No such file"):
        Tokenizer.open(tmp_path / "tokenizer.json", LENGTH)


def test_vocabulary_without_start_token_is_a_bundle_error(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"<|endoftext|>": 0, "a": 1}, merges=[]))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BundleError, match=r"no <\|startoftext\|>"):
        Tokenizer.open(tmp_path / "tokenizer.json", LENGTH)
