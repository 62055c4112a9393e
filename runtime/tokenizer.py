"""Prompts to the text encoder's `input_ids`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ipa.engines.errors import BundleError, RequestError

if TYPE_CHECKING:
    import tokenizers

# CLIP reads 75 tokens, about as many words; more than this is a file passed by mistake.
MAX_CHARACTERS = 20_000
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Encoding:
    """A prompt as the text encoder takes it."""

    ids: NDArray[np.int64]  # (max_tokens,): BOS, the prompt, EOS, padding
    cut: str  # the end of the prompt that did not fit; empty when all of it did


class Tokenizer:
    """A CLIP tokenizer, with the ids that transformers' `CLIPTokenizer` gives."""

    def __init__(self, backend: tokenizers.Tokenizer, max_tokens: int) -> None:
        """Take over `backend`, whose own padding and truncation are switched off.

        Raises:
            ValueError: the vocabulary has no start or end token.
        """
        bos, eos = backend.token_to_id(_BOS), backend.token_to_id(_EOS)
        if bos is None or eos is None:
            raise ValueError(f"its vocabulary has no {_BOS if bos is None else _EOS}")
        self.max_tokens = max_tokens
        self._bos, self._eos = bos, eos
        # SD1.5 pads with EOS; a model that pads otherwise (SD2.1: "!") says so in the file's padding section.
        self._pad: int = backend.padding["pad_id"] if backend.padding else eos
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._series = _series(backend)

    @classmethod
    def open(cls, path: Path, max_tokens: int) -> Tokenizer:
        """The tokenizer of a `tokenizer.json`.

        Args:
            path: the file.
            max_tokens: length of `input_ids`, 77 for Stable Diffusion.

        Raises:
            BundleError: the file is missing, broken, or not a CLIP tokenizer.
        """
        import tokenizers

        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise BundleError(f"tokenizer {path}: {reason}; export the bundle again") from error
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain `Exception`
            raise BundleError(f"tokenizer {path}: not a tokenizer.json; export the bundle again") from error
        try:
            return cls(backend, max_tokens)
        except ValueError as error:
            raise BundleError(
                f"tokenizer {path}: {error}; it must be a CLIP tokenizer, export the bundle again"
            ) from error

    def encode(self, text: str) -> Encoding:
        """The prompt's ids, and what had to be cut off to fit.

        Args:
            text: any prompt; the empty one is a prompt, too.

        Raises:
            RequestError: `text` is over 20,000 characters long, or holds a NUL or half a surrogate pair.
        """
        _check_text(text)
        encoding = self._backend.encode(text, add_special_tokens=False)
        # (id, where its text starts) of every token; a word of several vectors stands for all of them.
        tokens = [
            (member, start)
            for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)
            for member in self._series.get(token, (token,))
        ]
        room = self.max_tokens - 2
        ids = np.full(self.max_tokens, self._pad, dtype=np.int64)
        kept = [token for token, _ in tokens[:room]]
        ids[: len(kept) + 2] = [self._bos, *kept, self._eos]
        cut = text[tokens[room][1] :] if len(tokens) > room else ""
        return Encoding(ids, cut)


def _series(backend: tokenizers.Tokenizer) -> dict[int, tuple[int, ...]]:
    """Words that several vectors were learned for, by textual inversion: id of the word to ids of all its vectors.

    The vocabulary names them `word`, `word_1`, `word_2`, ..., which is diffusers' convention (`maybe_convert_prompt`).
    """
    added = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
    found = {}
    for word, index in added.items():
        names = [word, *takewhile(added.__contains__, (f"{word}_{n}" for n in count(1)))]
        if len(names) > 1:
            found[index] = tuple(added[name] for name in names)
    return found


def _check_text(text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise RequestError(
            f"prompt of {len(text)} characters, at most {MAX_CHARACTERS} are taken (the model reads about 75 words)"
        )
    for character in text:
        if character == "\0" or "\ud800" <= character <= "\udfff":
            raise RequestError(f"prompt holds the character U+{ord(character):04X}, which is not text; remove it")
