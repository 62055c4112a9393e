"""Textual inversion files: a word and the rows that it adds to the text encoder's embedding table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
# Stable Diffusion XL's files hold rows for both text encoders, under these names; the file's name is their word, too.
_TENSORS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


@dataclass(frozen=True)
class TextualInversionFile:
    """A file and the word it gets; `None`: the file's own, or what a bundle was made with."""

    path: Path
    token: str | None = None


@dataclass(frozen=True)
class TextualInversion:
    """A file that was read: `vectors` are (number of tokens, text width), float32, by text encoder."""

    record: TextualInversionRecord
    vectors: Mapping[str, Tensor] = field(repr=False)

    @property
    def tokens(self) -> list[str]:
        """A token for each vector, by diffusers' convention: `word`, `word_1`, `word_2`, ..."""
        word = self.record.token
        return [word, *(f"{word}_{index}" for index in range(1, self.record.vectors))]


def read_textual_inversion(file: TextualInversionFile, text_widths: Mapping[str, int]) -> TextualInversion:
    """Read an embedding in diffusers' or AUTOMATIC1111's layout, for two text encoders in Stable Diffusion XL's.

    Args:
        text_widths: of each text encoder: 768 in Stable Diffusion 1.x, 768 and 1280 in XL.
    Raises:
        IpaError: the file is missing, damaged, unsafe, of another layout, or for another base model.
    """
    what = f"textual inversion {file.path}"
    weights = read_weights(file.path, "textual inversion")
    own: str | None = file.path.stem
    if len(text_widths) > 1:
        vectors = _vectors_of_both(weights, what, text_widths)
    else:
        own, vector = _word_and_vectors(weights, file.path)
        vectors = dict.fromkeys(text_widths, vector)
    token = file.token or own
    if token is None:
        raise IpaError(f"{what} does not say its word; name it with --textual-inversion FILE=WORD")
    if not token.strip() or "\0" in token:
        raise IpaError(f"{what}: {token!r} cannot be a word of a prompt; use --textual-inversion FILE=WORD")
    rows = {part: _rows(vectors[part], what, width) for part, width in text_widths.items()}
    counts = [len(tensor) for tensor in rows.values()]
    if len(set(counts)) > 1:
        raise IpaError(f"{what}: clip_l and clip_g have {counts[0]} and {counts[1]} rows, expected as many")
    record = TextualInversionRecord(token, counts[0], file.path.name, hash_file(file.path))
    return TextualInversion(record, rows)


def _rows(vectors: Tensor, what: str, width: int) -> Tensor:
    """(number of tokens, width), float32."""
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not vectors.is_floating_point() or not torch.isfinite(vectors.float()).all():
        raise IpaError(f"{what} holds no rows of finite numbers, but {vectors.dtype} {tuple(vectors.shape)}")
    if vectors.shape[1] != width:
        raise IpaError(
            f"{what} is for a text encoder of width {vectors.shape[1]}, this base model's has {width} "
            "(768: Stable Diffusion 1.x, 1024: 2.x, 768 and 1280: XL); use one made for this base model"
        )
    return vectors.detach().float()


def _vectors_of_both(weights: Any, what: str, text_widths: Mapping[str, int]) -> dict[str, Tensor]:
    """The tensors of both text encoders."""
    found = weights if isinstance(weights, dict) else {}
    vectors = {part: found.get(_TENSORS[part]) for part in text_widths}
    if missing := [part for part, tensor in vectors.items() if not isinstance(tensor, Tensor)]:
        expected = " and ".join(f"{_TENSORS[part]} (rows of {width})" for part, width in text_widths.items())
        raise IpaError(
            f"{what} has no {_TENSORS[missing[0]]}; Stable Diffusion XL has two text encoders: expected the tensors "
            f"{expected}, use one made for XL"
        )
    return {part: tensor for part, tensor in vectors.items() if isinstance(tensor, Tensor)}


def _word_and_vectors(weights: Any, path: Path) -> tuple[str | None, Tensor]:
    """The file's own word, if it has one, and its tensor."""
    what = f"textual inversion {path}"
    if isinstance(weights, Tensor):
        return None, weights
    if isinstance(weights, dict) and set(_TENSORS.values()) & set(weights):
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


def add_embeddings(text_encoder: Any, part: str, inversions: Sequence[TextualInversion], ids: Sequence[int]) -> None:
    """Put the vectors into a CLIP text model's embedding table, which grows as needed.

    Args:
        part: which text encoder it is.
        ids: what `add_tokens` gave for its tokenizer.
    """
    rows = text_encoder.get_input_embeddings().num_embeddings
    text_encoder.resize_token_embeddings(max(rows, *(index + 1 for index in ids)), mean_resizing=False)
    with torch.no_grad():
        text_encoder.get_input_embeddings().weight[list(ids)] = torch.cat([item.vectors[part] for item in inversions])
