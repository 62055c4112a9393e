"""Keeping count of images that cannot be used: each is named once, too many are an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ipa.trainer.errors import TrainError

MAX_BROKEN_SHARE = 0.5
ENOUGH_TO_JUDGE = 20  # records


@dataclass(frozen=True)
class BrokenImage:
    """A record that cannot be used, because of which file, and why."""

    index: int
    file: Path
    reason: str


class BrokenImages:
    """The broken images of one run.

    Args:
        dataset_size: records in all.
        report: told of each broken file once.
    """

    def __init__(self, dataset_size: int, report: Callable[[str], None]) -> None:
        self._report = report
        self._files: set[Path] = set()
        self._is_usable = np.zeros(dataset_size, dtype=bool)
        self._is_broken = np.zeros(dataset_size, dtype=bool)

    def add(self, broken: BrokenImage) -> None:
        """Note a broken record."""
        self._is_broken[broken.index] = True
        if broken.file not in self._files:
            self._files.add(broken.file)
            self._report(f"skipped {broken.file}: {broken.reason}")

    def add_usable(self, index: int) -> None:
        """Note a record that could be read."""
        self._is_usable[index] = True

    @property
    def count(self) -> int:
        """Broken records so far."""
        return int(self._is_broken.sum())

    def check(self) -> None:
        """Stop when training would go on with less than half of the data.

        Raises:
            TrainError: all records, or more than half of those tried, are broken.
        """
        tried = self.count + int(self._is_usable.sum())
        if tried >= min(ENOUGH_TO_JUDGE, len(self._is_broken)):
            check_share(self.count, tried)


def check_share(broken: int, tried: int) -> None:
    """Refuse a data set with more than half of its records broken.

    Raises:
        TrainError: says how many are broken.
    """
    if broken > MAX_BROKEN_SHARE * tried:
        raise TrainError(
            f"{broken} of the {tried} records read have missing or broken images (named above); "
            "check --image-root and the data file"
        )
