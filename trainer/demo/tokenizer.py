"""A CLIP tokenizer whose every caption word is one token; other words fall apart into bytes."""

from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer

from ipa.trainer.demo.shapes import COLOURS, SHAPES, TEXTURES

WORDS = ("a", "on", "background", *TEXTURES, *COLOURS, *SHAPES)
MAX_LENGTH = 77
END_OF_WORD = "</w>"


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair encoding with merges learnt from the caption words alone."""
    vocabulary, merges = byte_pairs(WORDS)
    tokens = [*vocabulary, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_LENGTH
    )


def byte_pairs(words: tuple[str, ...]) -> tuple[list[str], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-pair encoding in which each of `words` is one token.

    The most frequent pair is merged until every word is whole; ties go to the pair met first.
    """
    pieces = {word: (*word[:-1], word[-1] + END_OF_WORD) for word in words}
    merges: list[tuple[str, str]] = []
    while any(len(split) > 1 for split in pieces.values()):
        pairs = Counter(pair for split in pieces.values() for pair in pairwise(split))
        best = max(pairs, key=lambda pair: pairs[pair])
        merges.append(best)
        pieces = {word: _merged(split, best) for word, split in pieces.items()}
    alphabet = _byte_alphabet()
    return [*alphabet, *(symbol + END_OF_WORD for symbol in alphabet), *(a + b for a, b in merges)], merges


def _merged(split: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for piece in split:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return tuple(merged)


def _byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level encodings (GPT-2's table, sorted by byte)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [characters[byte] for byte in range(256)]
