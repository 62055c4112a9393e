"""What a user asks for, checked before anything expensive starts."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, fields, replace
from pathlib import Path

from PIL import Image

from ipa.engines.errors import RequestError
from ipa.engines.manifest import Manifest
from ipa.engines.spec import SDXL
from ipa.runtime.block_scales import Scale, check_scale
from ipa.runtime.control_image import ControlImage
from ipa.runtime.image_prompt import ImagePrompt, ImageSource
from ipa.runtime.noise import SEED_LIMIT
from ipa.runtime.numbers import NUMBER_TEXT, is_number
from ipa.runtime.schedulers import SCHEDULER_NAMES

SIZE_MULTIPLE = 8  # pixels per latent
MIN_SIZE, MAX_SIZE = 64, 4096
MAX_STEPS = 1000
MAX_IMAGES = 256
MAX_SIZE_CONDITION = 65_536
_IMAGE_STRENGTH = 0.8
_SIZE_CONDITIONS = {"original_size": 1, "crops_coords_top_left": 0, "target_size": 1}  # and their least number


@dataclass(frozen=True)
class Request:
    """One call of the pipeline. `None` means: what the bundle's defaults say.

    Attributes:
        prompt: may be empty: the image alone then decides.
        image: the image prompt; `None` asks for the base model without an adapter.
        negative_prompt: what to move away from, when guidance is on. An empty one counts as not given: Stable Diffusion
            XL takes zeros for it if its pipeline says `force_zeros_for_empty_prompt`, as diffusers does for `None`.
        init_image: the picture to start from: image to image.
        mask_image: where `init_image` is made anew: white; the rest stays.
        strength: how far from `init_image`, above 0 up to 1: the share of the steps that run. `None` is 0.8, with a
            mask 1.
        adapter: which of the bundle's adapters.
        ip_adapter_scale: weight of the image prompt, or weights by block, see `ipa.runtime.block_scales`; 0 is the base
            model exactly.
        image_prompts: in place of the three before: several images, several adapters, masks.
        controls: pictures that ControlNets follow.
        guess_mode: ControlNets count for the positive half alone and so say more than the prompt does.
        guidance_scale: classifier-free guidance, 1 and below is off.
        guidance_rescale: 0 to 1, against the glare of a large guidance scale.
        seed: 0 to 2**64 - 1; `None` draws one.
        num_images: pictures drawn from one generator, as diffusers' `num_images_per_prompt`.
        only: make just the picture with this index of the `num_images`.
        height, width: pixels, multiples of 8; `None` is what `init_image` has, else the bundle's default.
        scheduler: one of `ipa.runtime.schedulers.SCHEDULER_NAMES`; `None` is the bundle's own.
        eta: noise added back at each step, DDIM only; 0 is deterministic.
        original_size, crops_coords_top_left, target_size: what Stable Diffusion XL is told of the picture, in pixels:
            (height, width) before it was cropped, (top, left) of the crop, (height, width) after it. `None` is the
            picture's own size, and no crop. Source: arXiv:2307.01952, section 2.2.
    """

    prompt: str = ""
    image: Image.Image | Path | str | None = None
    negative_prompt: str = ""
    init_image: ImageSource | None = None
    mask_image: ImageSource | None = None
    strength: float | None = None
    adapter: str | None = None
    ip_adapter_scale: Scale | None = None
    image_prompts: tuple[ImagePrompt, ...] = ()
    controls: tuple[ControlImage, ...] = ()
    guess_mode: bool = False
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    num_inference_steps: int | None = None
    seed: int | None = None
    num_images: int = 1
    only: int | None = None
    height: int | None = None
    width: int | None = None
    scheduler: str | None = None
    eta: float = 0.0
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise RequestError(f"{name} is {getattr(self, name)!r}, expected text")
        if not isinstance(self.image, Image.Image | Path | str | None):
            raise RequestError(f"image is {self.image!r}, expected a file's path or a PIL image")
        for name in ("init_image", "mask_image"):
            if not isinstance(getattr(self, name), ImageSource | None):
                raise RequestError(f"{name} is {getattr(self, name)!r}, expected a file's path or a PIL image")
        if self.init_image is None:
            for name in ("mask_image", "strength"):
                if getattr(self, name) is not None:
                    raise RequestError(f"{name} says what to do with a picture: add --init-image, or leave it out")
        _check_finite("strength", self.strength)
        if self.strength is not None and not 0 < self.strength <= 1:
            raise RequestError(f"strength is {self.strength}, expected more than 0 (nothing changes) up to 1")
        for name in ("adapter", "scheduler"):
            if not isinstance(getattr(self, name), str | None):
                raise RequestError(f"{name} is {getattr(self, name)!r}, expected a name")
        _check_int("num_inference_steps (--steps)", self.num_inference_steps, 1, MAX_STEPS)
        _check_int("seed", self.seed, 0, SEED_LIMIT - 1)
        _check_int("num_images", self.num_images, 1, MAX_IMAGES)
        _check_int("only", self.only, 0, self.num_images - 1)
        for name in ("guidance_scale", "guidance_rescale", "eta"):
            _check_finite(name, getattr(self, name))
        if self.ip_adapter_scale is not None:
            check_scale(self.ip_adapter_scale)
        if not isinstance(self.image_prompts, tuple) or not all(
            isinstance(one, ImagePrompt) for one in self.image_prompts
        ):
            raise RequestError(f"image_prompts is {self.image_prompts!r}, expected a tuple of ImagePrompt")
        if self.image_prompts and (self.image is not None or self.adapter or self.ip_adapter_scale is not None):
            raise RequestError("image_prompts take the place of image, adapter and ip_adapter_scale: give one or other")
        if not isinstance(self.controls, tuple) or not all(isinstance(one, ControlImage) for one in self.controls):
            raise RequestError(f"controls is {self.controls!r}, expected a tuple of ControlImage")
        if not isinstance(self.guess_mode, bool):
            raise RequestError(f"guess_mode is {self.guess_mode!r}, expected true or false")
        if self.guess_mode and not self.controls:
            raise RequestError("guess mode is a way to use ControlNets: add --control-image, or leave --guess-mode out")
        for name in ("height", "width"):
            _check_int(name, getattr(self, name), MIN_SIZE, MAX_SIZE)
            size = getattr(self, name)
            if size is not None and size % SIZE_MULTIPLE:
                below = size - size % SIZE_MULTIPLE
                raise RequestError(
                    f"{name} is {size}, expected a multiple of {SIZE_MULTIPLE}: try {below} or {below + SIZE_MULTIPLE}"
                )
        if self.scheduler is not None and self.scheduler not in SCHEDULER_NAMES:
            raise RequestError(f"unknown scheduler '{self.scheduler}', expected one of {', '.join(SCHEDULER_NAMES)}")
        for name in ("eta", "guidance_rescale"):
            if not 0 <= getattr(self, name) <= 1:
                raise RequestError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        for name, least in _SIZE_CONDITIONS.items():
            pair: object = getattr(self, name)
            if isinstance(pair, list):  # of a JSON record
                object.__setattr__(self, name, tuple(pair))
            if pair is not None and not (isinstance(pair, tuple | list) and len(pair) == 2):
                raise RequestError(f"{name} is {pair!r}, expected two whole numbers")
            for number in pair or ():
                _check_int(name, number, least, MAX_SIZE_CONDITION)

    def resolved(self, manifest: Manifest) -> Request:
        """This request with the bundle's defaults filled in and a seed drawn."""
        defaults = manifest.defaults
        given = [name for name in _SIZE_CONDITIONS if getattr(self, name) is not None]
        if given and manifest.family != SDXL:
            raise RequestError(
                f"{given[0]} is for Stable Diffusion XL, this bundle is of the family '{manifest.family}': leave it out"
            )
        chosen = {
            item.name: getattr(defaults, item.name)
            for item in fields(defaults)
            if hasattr(self, item.name) and getattr(self, item.name) is None
        }
        if self.image_prompts:
            chosen |= {"adapter": None, "ip_adapter_scale": None}
            chosen["image_prompts"] = tuple(
                replace(
                    prompt,
                    adapter=prompt.adapter or defaults.adapter,
                    scale=defaults.ip_adapter_scale if prompt.scale is None else prompt.scale,
                )
                for prompt in self.image_prompts
            )
        elif self.image is None:
            if self.adapter or self.ip_adapter_scale:
                raise RequestError("an adapter or its scale was given, but no image: add --image, or leave them out")
            chosen |= {"adapter": None, "ip_adapter_scale": None}
        if self.has_image and not (self.adapter or defaults.adapter):
            raise RequestError(
                "an image was given, but the bundle has no adapter: "
                "add one with `ipa-export adapter --bundle BUNDLE --adapter NAME=FILE`"
            )
        if self.init_image is not None and self.strength is None:
            chosen["strength"] = _IMAGE_STRENGTH if self.mask_image is None else 1.0
        if self.seed is None:
            chosen["seed"] = secrets.randbelow(2**32)
        return replace(self, **chosen)

    def sized(self, init_image: Image.Image | None) -> Request:
        """This request with the size of the picture it starts from, where it names none.

        Args:
            init_image: opened.
        """
        if init_image is None or (self.height is not None and self.width is not None):
            return self
        width, height = (max(MIN_SIZE, side - side % SIZE_MULTIPLE) for side in init_image.size)
        return replace(self, height=self.height or height, width=self.width or width)

    @property
    def first_step(self) -> int:
        """The step that the run begins with: the strength leaves out those before.

        Source: diffusers 0.42.1, pipeline_stable_diffusion_img2img.py, `get_timesteps`.
        """
        steps = self.num_inference_steps or 0
        return 0 if self.strength is None else steps - min(int(steps * self.strength), steps)

    @property
    def time_ids(self) -> tuple[int, ...]:
        """Original size, crop and target size, where the request is resolved."""
        size = (self.height or 0, self.width or 0)
        return (*(self.original_size or size), *(self.crops_coords_top_left or (0, 0)), *(self.target_size or size))

    @property
    def has_image(self) -> bool:
        """Whether there is an image prompt."""
        return self.image is not None or bool(self.image_prompts)

    @property
    def all_image_prompts(self) -> tuple[ImagePrompt, ...]:
        """The image prompts, the simple one too."""
        if self.image is None:
            return self.image_prompts
        return (ImagePrompt((self.image,), self.adapter, self.ip_adapter_scale),)

    @property
    def has_guidance(self) -> bool:
        """Whether the UNet runs on a negative and a positive half."""
        return self.guidance_scale is not None and self.guidance_scale > 1


def _check_int(name: str, value: int | None, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}, expected a whole number from {low} to {high}")


def _check_finite(name: str, value: float | None) -> None:
    if value is None:
        return
    if not is_number(value):
        raise RequestError(f"{name} is {value!r}, expected {NUMBER_TEXT}")
