"""Outputs of engines that come back in later requests: the newest ones, up to so many bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping

from ipa.engines.engine import Array

Outputs = Mapping[str, Array]


class Kept:
    """Arrays by name, by key; those that were not asked for longest go first."""

    def __init__(self, most_bytes: int = 2**28) -> None:
        self._arrays: OrderedDict[Hashable, Outputs] = OrderedDict()
        self._most_bytes = most_bytes

    def get(self, key: Hashable, make: Callable[[], Outputs]) -> Outputs:
        """The arrays of a key, made if they are not there; do not write to them."""
        if key not in self._arrays:
            self._arrays[key] = make()
        self._arrays.move_to_end(key)
        while len(self._arrays) > 1 and sum(map(_bytes, self._arrays.values())) > self._most_bytes:
            self._arrays.popitem(last=False)
        return self._arrays[key]


def _bytes(arrays: Outputs) -> int:
    return sum(array.nbytes for array in arrays.values())
