"""CLIP's tokenizer of its merges alone: the vocabulary follows from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ipa.engines.errors import IpaError
from ipa.export.source import reading

# The bytes that stand for themselves; the others are moved behind the first 256 code points, in order.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))


def clip_tokenizer(merges_file: Path, max_tokens: int, **special: str) -> Any:
    """The `CLIPTokenizer` of a `merges.txt`.

    Its vocabulary is: the 256 bytes, the same at the end of a word, what each merge makes, start and end.
    Source: github.com/openai/CLIP, `simple_tokenizer.py`.

    Args:
        max_tokens: of a prompt, 77.
        **special: tokens that differ from CLIP's own, such as `pad_token`.
    Raises:
        IpaError: a line is no pair.
    """
    from transformers import CLIPTokenizer

    with reading(str(merges_file)):
        text = merges_file.read_text("utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#version")]
    merges = [tuple(line.split(" ")) for line in lines]
    if any(len(merge) != 2 for merge in merges):
        raise IpaError(f"{merges_file} has a line that is no pair; expected CLIP's merges.txt")
    symbols = [chr(byte) for byte in _PRINTABLE] + [chr(256 + n) for n in range(256 - len(_PRINTABLE))]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(merge) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_tokens, **special)
