"""A request on its way through the pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from numpy.typing import NDArray
from PIL import Image

from ipa.runtime.control_image import ControlImage
from ipa.runtime.image_slots import OpenedPrompt, Slot
from ipa.runtime.request import Request
from ipa.runtime.schedulers import Schedule

Array = NDArray[Any]


@dataclass(frozen=True)
class Run:
    """What is known of a request so far.

    Attributes:
        request: resolved.
        schedule: its run of the scheduler.
        prompts: its image prompts, opened.
        init_image, mask_image: opened.
        controls: opened.
        text: what the UNet is told of the text, by input: (2, ...) negative and positive, (1, ...) where alike.
        slots: what the UNet's image slots show.
        warnings: for the user.
    """

    request: Request
    schedule: Schedule
    prompts: tuple[OpenedPrompt, ...]
    init_image: Image.Image | None = None
    mask_image: Image.Image | None = None
    controls: tuple[ControlImage, ...] = ()
    text: Mapping[str, Array] = field(default_factory=dict)
    slots: tuple[Slot, ...] = ()
    warnings: tuple[str, ...] = ()

    def with_text(self, text: Mapping[str, Array], warnings: Sequence[str]) -> Self:
        """This with the text encoded."""
        return replace(self, text=text, warnings=(*self.warnings, *warnings))

    def with_slots(self, slots: Sequence[Slot]) -> Self:
        """This with the image prompts encoded."""
        return replace(self, slots=tuple(slots))

    @property
    def count(self) -> int:
        """How many pictures it makes."""
        return self.request.num_images if self.request.only is None else 1
