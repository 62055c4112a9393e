"""Results that come back in later requests: the newest ones, up to so many bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from ipa.engines.engine import Array


class Kept:
    """Arrays by key; the one that was not asked for longest goes first."""

    def __init__(self, most_bytes: int = 2**28) -> None:
        self._arrays: OrderedDict[Hashable, Array] = OrderedDict()
        self._most_bytes = most_bytes

    def get(self, key: Hashable, make: Callable[[], Array]) -> Array:
        """The array of a key, made if it is not there; do not write to it."""
        if key not in self._arrays:
            self._arrays[key] = make()
        self._arrays.move_to_end(key)
        while len(self._arrays) > 1 and sum(array.nbytes for array in self._arrays.values()) > self._most_bytes:
            self._arrays.popitem(last=False)
        return self._arrays[key]
