"""Textual inversion files: a word and the rows that it adds to the text encoder's embedding table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipa.engines.bundle import hash_file
from ipa.engines.errors import IpaError
from ipa.engines.manifest import TextualInversionRecord
from ipa.export.weight_files import read_weights

_UNNAMED = "emb_params"  # AUTOMATIC1111's `.safetensors` files do not say their word: the file's name is it


@dataclass(frozen=True)
class TextualInversionFile:
    """A file and the word it gets; `None`: the file's own, or what a bundle was made with."""

    path: Path
    token: str | None = None


@dataclass(frozen=True)
class TextualInversion:
    """A file that was read: `vectors` is (number of tokens, text width), float32."""

    record: TextualInversionRecord
    vectors: Tensor = field(repr=False)

    @property
    def tokens(self) -> list[str]:
        """A token for each vector, by diffusers' convention: `word`, `word_1`, `word_2`, ..."""
        word = self.record.token
        return [word, *(f"{word}_{index}" for index in range(1, self.record.vectors))]


def read_textual_inversion(file: TextualInversionFile, text_width: int) -> TextualInversion:
    """Read an embedding in diffusers' or AUTOMATIC1111's layout.

    Args:
        text_width: of the text encoder, 768 in Stable Diffusion 1.x.
    Raises:
        IpaError: the file is missing, damaged, unsafe, of another layout, or for another base model.
    """
    what = f"textual inversion {file.path}"
    own, vectors = _word_and_vectors(read_weights(file.path, "textual inversion"), file.path)
    token = file.token or own
    if token is None:
        raise IpaError(f"{what} does not say its word; name it with --textual-inversion FILE=WORD")
    if not token.strip() or "\0" in token:
        raise IpaError(f"{what}: {token!r} cannot be a word of a prompt; use --textual-inversion FILE=WORD")
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not vectors.is_floating_point() or not torch.isfinite(vectors.float()).all():
        raise IpaError(f"{what} holds no rows of finite numbers, but {vectors.dtype} {tuple(vectors.shape)}")
    if vectors.shape[1] != text_width:
        raise IpaError(
            f"{what} is for a text encoder of width {vectors.shape[1]}, this base model's has {text_width} "
            "(768: Stable Diffusion 1.x, 1024: 2.x); use one made for this base model"
        )
    record = TextualInversionRecord(token, len(vectors), file.path.name, hash_file(file.path))
    return TextualInversion(record, vectors.detach().float())


def _word_and_vectors(weights: Any, path: Path) -> tuple[str | None, Tensor]:
    """The file's own word, if it has one, and its tensor."""
    what = f"textual inversion {path}"
    if isinstance(weights, Tensor):
        return None, weights
    if isinstance(weights, dict) and {"clip_l", "clip_g"} & set(weights):
        raise IpaError(f"{what} is for Stable Diffusion XL; use one made for 1.x")
    if isinstance(weights, dict) and "string_to_param" in weights:
        params, name = weights["string_to_param"], weights.get("name")
        vectors = params.get("*") if isinstance(params, dict) else None
        if isinstance(vectors, Tensor):
            return name if isinstance(name, str) else None, vectors
    elif isinstance(weights, dict) and len(weights) == 1:
        ((name, vectors),) = weights.items()
        if isinstance(vectors, Tensor):
            return path.stem if name == _UNNAMED else str(name), vectors
    raise IpaError(f"{what} is in neither diffusers' layout (one tensor, named as its word) nor AUTOMATIC1111's")


def add_tokens(tokenizer: Any, inversions: Sequence[TextualInversion]) -> list[int]:
    """Teach a transformers tokenizer the words.

    Returns:
        The ids of all new tokens, in the order of `inversions`' vectors.
    Raises:
        IpaError: a word is taken.
    """
    ids = []
    for inversion in inversions:
        known = {token.lower() for token in tokenizer.get_vocab()}
        for token in inversion.tokens:
            if token.lower() in known:
                raise IpaError(
                    f"textual inversion {inversion.record.name}: the tokenizer knows {token!r} already; "
                    "give it another word with --textual-inversion FILE=WORD"
                )
        tokenizer.add_tokens(inversion.tokens)
        ids += tokenizer.convert_tokens_to_ids(inversion.tokens)
    return ids


def add_embeddings(text_encoder: Any, inversions: Sequence[TextualInversion], ids: Sequence[int]) -> None:
    """Put the vectors into a `CLIPTextModel`'s embedding table, which grows as needed.

    Args:
        ids: what `add_tokens` gave.
    """
    rows = text_encoder.get_input_embeddings().num_embeddings
    text_encoder.resize_token_embeddings(max(rows, *(index + 1 for index in ids)), mean_resizing=False)
    with torch.no_grad():
        text_encoder.get_input_embeddings().weight[list(ids)] = torch.cat([item.vectors for item in inversions])
