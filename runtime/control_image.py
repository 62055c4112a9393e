"""Control images: what a ControlNet makes the picture follow, how much, and in which steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from ipa.engines.errors import RequestError
from ipa.runtime.image_prompt import ImageSource
from ipa.runtime.numbers import NUMBER_TEXT, is_number
from ipa.runtime.window import check_window, is_in_window


@dataclass(frozen=True)
class ControlImage:
    """A picture for one ControlNet, such as edges or a pose; several add up.

    Attributes:
        image: what it is to follow, in the form that the ControlNet was trained on; scaled to the picture's size.
        name: which of the bundle's; `None`: the only one.
        scale: `controlnet_conditioning_scale`; 0 is none.
        start, end: the share of the denoising steps in which it counts, 0 to 1.
    """

    image: ImageSource
    name: str | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str | None):
            raise RequestError(f"name of a ControlNet is {self.name!r}, expected text")
        named = f" of ControlNet '{self.name}'" if self.name else ""
        if not isinstance(self.image, ImageSource):
            raise RequestError(f"control image{named} is {self.image!r}, expected a file's path or a PIL image")
        if not is_number(self.scale):
            raise RequestError(f"control scale{named} is {self.scale!r}, expected {NUMBER_TEXT}")
        check_window("control ", named, self.start, self.end)

    def scale_at(self, index: int, count: int) -> float:
        """What its residuals are multiplied by in step `index` of `count`; 0 where it does not count."""
        return self.scale if is_in_window(index, count, self.start, self.end) else 0.0

    def record(self) -> dict[str, Any]:
        """As JSON values; a picture that came from no file is left out."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {**values, "image": str(self.image) if isinstance(self.image, Path | str) else None}

    @classmethod
    def from_record(cls, record: object) -> Self:
        """What `record` wrote.

        Raises:
            RequestError: it did not, or the picture came from no file.
        """
        names = {item.name for item in fields(cls)}
        if not isinstance(record, Mapping) or not set(record) <= names or not isinstance(record.get("image"), str):
            raise RequestError(f"{record!r} is not a control image as ipa-run writes it; give --control-image yourself")
        return cls(**record)

    @classmethod
    def from_records(cls, records: object) -> tuple[Self, ...]:
        """Several of them.

        Raises:
            RequestError: as `from_record`, or it is no list.
        """
        if not isinstance(records, list):
            raise RequestError(f"controls is {records!r}, expected a list")
        return tuple(map(cls.from_record, records))
