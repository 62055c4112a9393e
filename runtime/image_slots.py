"""From image prompts to what the UNet's image slots take."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ipa.engines.bundle import Bundle
from ipa.engines.engine import Array, Engine
from ipa.engines.errors import RequestError
from ipa.engines.kv_layout import KVLayout
from ipa.engines.packed_kv import image_inputs, scale_values
from ipa.engines.spec import ComponentSpec, ImageSlots, positions
from ipa.runtime.block_scales import layer_scales
from ipa.runtime.conditioning import guidance_batch, image_features
from ipa.runtime.image_prompt import ImagePrompt, check_masks
from ipa.runtime.images import open_image, preprocess
from ipa.runtime.kept import Kept, Outputs
from ipa.runtime.masks import binary_mask, check_ratio, mask_level

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
        wanted = f"{needed} image slot{'s' * (needed > 1)}{' with masks' if has_masks else ''}"
        raise RequestError(
            f"the request needs {wanted}, the UNet of {bundle.root} "
            f"has {slots.count}{'' if slots.has_masks else ' and no masks'}: "
            f"export it again with `ipa-export onnx ... {option}`"
        )
    for prompt in prompts:
        bundle.adapter(str(prompt.adapter))
        layer_scales(_scale(prompt), bundle.manifest.kv_layout, bundle.manifest.family)


@dataclass(frozen=True)
class OpenedPrompt:
    """An image prompt with its files read.

    Attributes:
        images, masks: RGB.
        features: (2, images, ...) in place of images.
    """

    prompt: ImagePrompt
    images: tuple[Image.Image, ...]
    masks: tuple[Image.Image, ...]
    features: Array | None = None


def opened(prompt: ImagePrompt, bundle: Bundle) -> OpenedPrompt:
    """Read what a prompt names.

    Raises:
        RequestError: a file is missing or not what it should be.
    """
    images, masks = (tuple(map(open_image, pictures)) for pictures in (prompt.images, prompt.masks))
    if prompt.embeds is None:
        return OpenedPrompt(prompt, images, masks)
    from ipa.runtime.image_embeds import read_embeds

    features = read_embeds(Path(prompt.embeds), bundle.adapter(str(prompt.adapter)), bundle)
    if masks:
        check_masks(len(masks), features.shape[1], prompt.adapter)
    return OpenedPrompt(prompt, images, masks, features)


def image_slots(
    prompts: Sequence[OpenedPrompt], bundle: Bundle, engine: OpenEngine, kept: Kept, height: int, width: int
) -> list[Slot]:
    """Keys and values of every image prompt.

    Args:
        engine: opens a component; called only for what is not kept.
        kept: of earlier requests.
        height, width: of the picture to be made.
    Raises:
        RequestError: a mask does not fit the picture.
    """
    manifest, slots = bundle.manifest, []
    layout = manifest.kv_layout
    latents = height // manifest.vae.downscale, width // manifest.vae.downscale
    for one in prompts:
        scales = layer_scales(_scale(one.prompt), layout, manifest.family)
        shown = [scale_values(image_kv, layout, scales) for image_kv in _keys_values(one, bundle, engine, kept)]
        if not one.masks:
            slots.append(Slot(np.concatenate(shown, axis=1), None, one.prompt))
        for image_kv, picture in zip(shown, one.masks, strict=False):
            what = f"a mask of adapter '{one.prompt.adapter}'"
            check_ratio(what, picture, (width, height), manifest.vae.downscale)  # a photo's size is rounded to latents
            mask = binary_mask(picture, height, width)
            by_level = {level: mask_level(mask, level, *latents) for level in set(layout.levels)}
            slots.append(Slot(image_kv, by_level, one.prompt))
    return slots


def prompt_features(one: OpenedPrompt, bundle: Bundle, engine: OpenEngine, kept: Kept) -> Array:
    """The image features of a prompt, (2, images, ...), as `ipa.runtime.image_embeds` keeps them."""
    if one.features is not None:
        return one.features
    name = str(one.prompt.adapter)
    record = bundle.adapter(name)

    def encode(image: Image.Image) -> Outputs:
        pixel_values = preprocess([image], bundle.manifest.image_processor)
        return {record.feature: image_features(engine("image_encoder"), pixel_values, name, record)}

    kind = ("features", record.feature, record.negative)
    made = [kept.get((*kind, *_content(image)), partial(encode, image)) for image in one.images]
    return np.stack([outputs[record.feature] for outputs in made], axis=1)


def _keys_values(one: OpenedPrompt, bundle: Bundle, engine: OpenEngine, kept: Kept) -> list[Array]:
    """Of each image, unscaled, (2, tokens, kv)."""
    name = str(one.prompt.adapter)
    feature = bundle.adapter(name).feature

    def project(features: Array) -> Outputs:
        return engine(f"ip_adapter/{name}")(**{feature: features})

    features = [
        np.ascontiguousarray(halves) for halves in np.moveaxis(prompt_features(one, bundle, engine, kept), 1, 0)
    ]
    keys = [("image_kv", name, hashlib.sha256(array.tobytes()).digest()) for array in features]
    return [kept.get(key, partial(project, array))["image_kv"] for key, array in zip(keys, features, strict=True)]


def _content(image: Image.Image) -> tuple[object, ...]:
    """Equal for equal pictures."""
    return image.size, hashlib.sha256(image.tobytes()).digest()


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
