"""A progress bar for runs of many blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Progress = Callable[[str | None, int], None]  # what is done now (`None`: the same as before), and blocks that are done


@contextmanager
def progress_bar(blocks: int) -> Iterator[Progress]:
    """A bar of `blocks`, on a terminal."""
    with tqdm(total=blocks, unit="block", disable=None) as bar:

        def show(text: str | None, done: int) -> None:
            if text is not None:
                bar.set_description(text)
            bar.update(done)

        yield show
