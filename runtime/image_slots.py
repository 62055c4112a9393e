"""From image prompts to what the UNet's image slots take."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image

from ipa.engines.bundle import Bundle
from ipa.engines.engine import Array, Engine
from ipa.engines.errors import RequestError
from ipa.engines.manifest import AdapterRecord
from ipa.engines.packed_kv import image_inputs, scale_values
from ipa.engines.spec import ComponentSpec, ImageSlots, KVLayout, positions
from ipa.runtime.block_scales import layer_scales
from ipa.runtime.conditioning import guidance_batch, image_features
from ipa.runtime.image_prompt import ImagePrompt, ImageSource
from ipa.runtime.images import open_image, preprocess
from ipa.runtime.kept import Kept, Outputs
from ipa.runtime.masks import binary_mask, mask_level

OpenEngine = Callable[[str], Engine]  # by component


@dataclass(frozen=True)
class Slot:
    """What one of the UNet's slots shows.

    Attributes:
        image_kv: (2, tokens, kv) scaled keys and values, negative and positive.
        mask: (positions,) by level; `None`: the whole picture.
        prompt: where it is from, which knows in which steps it counts.
    """

    image_kv: Array
    mask: Mapping[int, Array] | None
    prompt: ImagePrompt


def check_slots(prompts: Sequence[ImagePrompt], bundle: Bundle) -> None:
    """Refuse image prompts that the bundle's UNet has no room for, or no adapter.

    Raises:
        RequestError: says what it has and how to export for more.
        BundleError: there is no such adapter.
    """
    slots = ImageSlots.of(bundle.manifest.components["unet"].spec)
    needed = sum(prompt.slots for prompt in prompts)
    has_masks = any(prompt.masks for prompt in prompts)
    if needed > slots.count or (has_masks and not slots.has_masks):
        option = f"--image-slots {max(needed, slots.count)}" + (" --masks" if has_masks or slots.has_masks else "")
        raise RequestError(
            f"the request needs {needed} image slots{' with masks' if has_masks else ''}, the UNet of {bundle.root} "
            f"has {slots.count}{'' if slots.has_masks else ' and no masks'}: "
            f"export it again with `ipa-export onnx ... {option}`"
        )
    for prompt in prompts:
        bundle.adapter(str(prompt.adapter))
        layer_scales(_scale(prompt), bundle.manifest.kv_layout, bundle.manifest.family)


def opened(prompt: ImagePrompt) -> ImagePrompt:
    """The same with its pictures read.

    Raises:
        RequestError: a file is missing or no picture.
    """

    def read(pictures: tuple[ImageSource, ...]) -> tuple[Image.Image, ...]:
        return tuple(open_image(picture) for picture in pictures)

    return replace(prompt, images=read(prompt.images), masks=read(prompt.masks))


def image_slots(
    prompts: Sequence[ImagePrompt], bundle: Bundle, engine: OpenEngine, kept: Kept, height: int, width: int
) -> list[Slot]:
    """Keys and values of every image prompt.

    Args:
        prompts: opened, see `opened`.
        engine: opens a component; called only for what is not kept.
        kept: of earlier requests.
        height, width: of the picture to be made.
    Raises:
        RequestError: a mask does not fit the picture.
    """
    manifest, slots = bundle.manifest, []
    layout = manifest.kv_layout
    latents = height // manifest.vae.downscale, width // manifest.vae.downscale
    for prompt in prompts:
        record = bundle.adapter(str(prompt.adapter))
        scales = layer_scales(_scale(prompt), layout, manifest.family)
        shown = []
        for image in prompt.images:
            assert isinstance(image, Image.Image)
            key = ("image_kv", prompt.adapter, image.size, hashlib.sha256(image.tobytes()).digest())
            made = kept.get(key, partial(_image_kv, image, str(prompt.adapter), record, bundle, engine))
            shown.append(scale_values(made["image_kv"], layout, scales))
        if not prompt.masks:
            slots.append(Slot(np.concatenate(shown, axis=1), None, prompt))
        for image_kv, picture in zip(shown, prompt.masks, strict=False):
            assert isinstance(picture, Image.Image)
            mask = binary_mask(picture, height, width)
            by_level = {level: mask_level(mask, level, *latents) for level in set(layout.levels)}
            slots.append(Slot(image_kv, by_level, prompt))
    return slots


def _image_kv(image: Image.Image, name: str, record: AdapterRecord, bundle: Bundle, engine: OpenEngine) -> Outputs:
    """`image_kv`: unscaled keys and values of the negative and the positive half, (2, tokens, kv)."""
    pixel_values = preprocess([image], bundle.manifest.image_processor)
    features = image_features(engine("image_encoder"), pixel_values, name, record)
    return engine(f"ip_adapter/{name}")(**{record.feature: features})


def _scale(prompt: ImagePrompt) -> float | str | Mapping[str, object]:
    assert prompt.scale is not None  # a resolved request has one
    return prompt.scale


class SlotInputs:
    """The UNet's inputs for image prompts at each step, each made once and read-only: engines keep them."""

    def __init__(
        self,
        requests: Sequence[Sequence[Slot]],
        counts: Sequence[int],
        unet: ComponentSpec,
        layout: KVLayout,
        size: tuple[int, int],
        has_guidance: bool,
    ) -> None:
        """Take the slots in use.

        Args:
            requests: the slots of each request of a batch, equal in number and tokens.
            counts: pictures of each.
            unet: its spec.
            size: height and width of the latents.
        """
        self._requests, self._counts = requests, counts
        self._unet, self._layout, self._size, self._has_guidance = unet, layout, size, has_guidance
        self._made: dict[tuple[bool, ...], dict[str, Array]] = {}

    def at(self, index: int, count: int) -> Mapping[str, Array]:
        """Those of step `index` of `count`."""
        active = tuple(slot.prompt.is_active(index, count) for slots in self._requests for slot in slots)
        if active not in self._made:
            self._made[active] = self._make(index, count)
        return self._made[active]

    def _make(self, index: int, count: int) -> dict[str, Array]:
        by_slot = list(zip(*self._requests, strict=True))  # each with one of every request
        images, masks = [], []
        for slots in by_slot:
            shown = [
                slot.image_kv if slot.prompt.is_active(index, count) else np.zeros_like(slot.image_kv) for slot in slots
            ]
            images.append(guidance_batch(shown, self._counts, self._has_guidance))
            masks.append(self._joined_masks(slots))
        batch = sum(self._counts) * (2 if self._has_guidance else 1)
        inputs = image_inputs(self._unet, self._layout, (batch, *self._size), images, masks)
        for array in inputs.values():
            array.flags.writeable = False
        return inputs

    def _joined_masks(self, slots: Sequence[Slot]) -> Mapping[int, Array] | None:
        """The masks of one slot for the whole batch, (batch, positions) by level."""
        if all(slot.mask is None for slot in slots):
            return None
        joined = {}
        for level in set(self._layout.levels):
            whole = np.ones(positions(level, *self._size), np.float32)
            rows = [(whole if slot.mask is None else slot.mask[level])[None] for slot in slots]
            joined[level] = guidance_batch(rows, self._counts, self._has_guidance)
        return joined
