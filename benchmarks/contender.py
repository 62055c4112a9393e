"""What takes part in a speed run, and what it is asked to do.

Nothing heavy is imported: our own side has no PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ipa.runtime.control_image import ControlImage
from ipa.runtime.request import Request

TASKS = ("variation", "img2img", "inpaint", "controlnet")
PROMPT, NEGATIVE = "a photo of a cat", "a dog"
STRENGTH = 0.8
INPAINT_CHANNELS = 9  # of the UNet of an inpainting model
PICTURE_GRAIN = 8  # pixels of the random pictures before they are enlarged


class Contender(Protocol):
    """Something that can draw, in a process of its own.

    Attributes:
        dtype: that it computes in.
        stages: what happens once for a picture, by name; each call runs it and waits for it.
    """

    dtype: str
    stages: Mapping[str, Callable[[], object]]

    def block(self) -> tuple[float, float | None]:
        """Run the loop's first steps.

        Returns:
            Seconds by the host's clock, the device waited for; by the device's events, where it has them.
        """
        ...


@dataclass(frozen=True)
class Setting:
    """The work: the same for everyone.

    Attributes:
        task: one of `TASKS`.
        images: pictures a call.
        height, width: pixels.
        steps: `num_inference_steps` of the whole run.
        block_steps: calls of the UNet, from the first on, that are timed at one go.
        has_image: whether there is an image prompt.
        control: which ControlNet, where the bundle has several.
    """

    task: str
    images: int
    height: int
    width: int
    steps: int
    block_steps: int
    scheduler: str
    guidance_scale: float
    has_image: bool = True
    control: str | None = None

    @property
    def unet_batch(self) -> int:
        """Rows of one call of the UNet."""
        return self.images * (2 if self.guidance_scale > 1 else 1)

    def request(self) -> Request:
        """What is to be drawn, the same in every process."""
        size = (self.width, self.height)
        extra: dict[str, Any] = {"height": self.height, "width": self.width}
        if self.task in ("img2img", "inpaint"):
            extra |= {"init_image": picture(1, size), "strength": STRENGTH}
        if self.task == "inpaint":
            extra["mask_image"] = _half_mask(size)
        if self.task == "controlnet":
            extra["controls"] = (ControlImage(picture(2, size), self.control),)
        return Request(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            image=picture(0, size) if self.has_image else None,
            ip_adapter_scale=1.0 if self.has_image else None,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            num_images=self.images,
            scheduler=self.scheduler,
            seed=0,
            **extra,
        )


def encoded_pictures(task: str, unet_channels: int) -> int:
    """How many pictures the VAE encodes for a run from an image: inpainting models also get it with the hole."""
    return 2 if task == "inpaint" and unet_channels == INPAINT_CHANNELS else 1


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Random patches of colour, (width, height)."""
    patches = np.random.default_rng(seed).integers(0, 256, (PICTURE_GRAIN, PICTURE_GRAIN, 3), np.uint8)
    return Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC)


def _half_mask(size: tuple[int, int]) -> Image.Image:
    """White on the left."""
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask
