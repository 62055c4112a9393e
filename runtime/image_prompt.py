"""Image prompts: which images an adapter shows the model, how much they count, where and when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeAlias

from PIL import Image

from ipa.engines.errors import RequestError
from ipa.runtime.block_scales import Scale, check_scale
from ipa.runtime.window import check_window, is_in_window

ImageSource: TypeAlias = Image.Image | Path | str


@dataclass(frozen=True)
class ImagePrompt:
    """Images for one adapter. Those without masks share one attention, those with masks have one each.

    Attributes:
        images: one or several; their order does not matter.
        embeds: in their place, a file of their features, see `ipa.runtime.image_embeds`.
        adapter: which of the bundle's; `None`: its default.
        scale: `ip_adapter_scale`, see `ipa.runtime.block_scales`; `None`: the bundle's default.
        masks: none, or one for each image: it counts where the mask is bright.
        start, end: the share of the denoising steps in which they count, 0 to 1.
    """

    images: tuple[ImageSource, ...] = ()
    adapter: str | None = None
    scale: Scale | None = None
    masks: tuple[ImageSource, ...] = ()
    start: float = 0.0
    end: float = 1.0
    embeds: Path | str | None = None

    def __post_init__(self) -> None:
        for name, pictures in (("images", self.images), ("masks", self.masks)):
            if not isinstance(pictures, tuple) or not all(isinstance(one, ImageSource) for one in pictures):
                raise RequestError(f"{name} is {pictures!r}, expected a tuple of files or PIL images")
        if not isinstance(self.adapter, str | None):
            raise RequestError(f"adapter is {self.adapter!r}, expected a name")
        named = f" of adapter '{self.adapter}'" if self.adapter else ""
        if not isinstance(self.embeds, Path | str | None):
            raise RequestError(f"embeds{named} is {self.embeds!r}, expected a file's path")
        if self.images and self.embeds is not None:
            raise RequestError(f"there are images and embeds{named}: give --image or --image-embeds")
        if not self.images and self.embeds is None:
            raise RequestError(f"there is no image{named}: add --image {self.adapter or 'NAME'}=FILE")
        if self.masks and self.images:
            check_masks(len(self.masks), len(self.images), self.adapter)
        if self.scale is not None:
            check_scale(self.scale)
        check_window("ip_adapter_", named, self.start, self.end)

    @property
    def slots(self) -> int:
        """How many of the UNet's slots it takes."""
        return len(self.masks) or 1

    def is_active(self, index: int, count: int) -> bool:
        """Whether it counts in step `index` of `count`."""
        return is_in_window(index, count, self.start, self.end)

    def record(self) -> dict[str, Any]:
        """As JSON values; pictures that came from no file are left out."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        embeds = None if self.embeds is None else str(self.embeds)
        return {**values, "images": _paths(self.images), "masks": _paths(self.masks), "embeds": embeds}

    @classmethod
    def recorded_fields(cls, record: object) -> dict[str, Any]:
        """Those fields that a record names, by `record` or by hand.

        Raises:
            RequestError: it is no such record.
        """
        names = {item.name for item in fields(cls)}
        if (
            not isinstance(record, Mapping)
            or not set(record) <= names
            or not isinstance(record.get("images", []), list)
        ):
            raise RequestError(f"{record!r} is not an image prompt as ipa-run writes it; give --image yourself")
        found = {name: value for name, value in record.items() if value is not None}
        return found | {name: tuple(found[name]) for name in ("images", "masks") if isinstance(found.get(name), list)}

    @classmethod
    def from_record(cls, record: object) -> Self:
        """What `record` wrote.

        Raises:
            RequestError: it did not.
        """
        return cls(**cls.recorded_fields(record))


def check_masks(masks: int, images: int, adapter: str | None) -> None:
    """Refuse masks that are not one for each image.

    Raises:
        RequestError: says how many there are of both.
    """
    if masks != images:
        named = f" of adapter '{adapter}'" if adapter else ""
        raise RequestError(f"{masks} masks for {images} images{named}: give one for each image")


def _paths(pictures: tuple[ImageSource, ...]) -> list[str]:
    return [str(picture) for picture in pictures if isinstance(picture, Path | str)]
