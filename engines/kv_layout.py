"""Where each cross-attention layer's keys and values lie in the packed inputs of the UNet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class KVLayer:
    """One cross-attention layer: its module path in the UNet and its width."""

    name: str
    width: int


@dataclass(frozen=True)
class KVLayout:
    """How keys and values of all cross-attention layers share the last axis of `text_kv` and `image_kv`.

    Layer i lies at a fixed offset as `[K_i | V_i]`, in the order of an adapter file's keys:
    down blocks, up blocks, mid block last (`unet.attn_processors` restricted to `attn2`).
    """

    layers: tuple[KVLayer, ...]

    @property
    def size(self) -> int:
        """Length of the packed axis: 2 * sum of the widths."""
        return 2 * sum(layer.width for layer in self.layers)

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each layer, in order."""
        return tuple(layer.width for layer in self.layers)

    @property
    def levels(self) -> tuple[int, ...]:
        """Resolution of each layer: at level n a picture has ceil(latent size / 2**n) positions a side.

        The blocks on the way up mirror those on the way down; the middle one stays where the last of them ended.
        """
        places = [layer.name.split(".")[:2] for layer in self.layers]
        down = [int(index) for block, index in places if block == "down_blocks"]
        up = [int(index) for block, index in places if block == "up_blocks"]
        last = min(down) + max(up)
        levels = {("down_blocks", str(level)): level for level in down}
        levels |= {("up_blocks", str(index)): last - index for index in up}
        return tuple(levels.get((block, index), last) for block, index in places)

    def value_slices(self) -> Iterator[slice]:
        """Where each layer's values lie on the packed axis; what scales an image prompt scales these."""
        ends = accumulate(2 * width for width in self.widths)
        return (slice(end - width, end) for end, width in zip(ends, self.widths, strict=True))
