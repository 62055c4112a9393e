"""Which part is being worked on: a bar on a terminal, one line per part elsewhere, both on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm


class Progress(Protocol):
    """Told of each part before the work on it starts, and how many there are in all."""

    def __call__(self, part: str, total: int) -> None: ...


@contextmanager
def progress(verb: str) -> Iterator[Progress]:
    """Show progress over parts.

    Args:
        verb: what is done, such as `export`.
    """
    if not sys.stderr.isatty():
        yield lambda part, total: print(f"{verb} {part}", file=sys.stderr, flush=True)
        return
    with tqdm(unit="part", leave=False) as bar:
        is_first = True

        def show(part: str, total: int) -> None:
            nonlocal is_first
            bar.total = total
            bar.set_description(f"{verb} {part}")
            if not is_first:
                bar.update()
            is_first = False

        yield show


def silent(part: str, total: int) -> None:
    """Progress that nobody watches."""
