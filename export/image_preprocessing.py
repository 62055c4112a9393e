"""How pictures are prepared for the image encoder, of the files that say it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ipa.engines.errors import IpaError
from ipa.engines.manifest import ImageProcessorRecord
from ipa.export.source import Source

_FILE = "preprocessor_config.json"
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_CLIP_SIZE = 224  # where a file names none
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")  # all of which the runtime does
_CLASSES = ("image_processor_type", "feature_extractor_type")


def image_processor(encoder: Source, part: str, pipeline: Source, size: int) -> ImageProcessorRecord:
    """What the image encoder's own file says, else the pipeline's, else CLIP's values.

    The pipeline's may be for another image encoder than one that is named apart; then it has another size, mostly.

    Args:
        encoder: source of the image encoder.
        part: its sub-folder there; empty for one that is named apart.
        pipeline: source of the base model.
        size: side of the pictures that the encoder takes.
    Raises:
        IpaError: pictures are prepared in a way that the runtime does not know, or for another size.
    """
    own, pipelines = f"{part}/{_FILE}".lstrip("/"), f"feature_extractor/{_FILE}"
    if (config := encoder.json(own)) is not None:
        return _record(f"{encoder}/{own}", config, size)
    config = pipeline.json(pipelines)
    if config is None or (not part and _shortest_edge(config) != size):
        return ImageProcessorRecord(size, _CLIP_MEAN, _CLIP_STD)
    return _record(f"{pipeline}/{pipelines}", config, size)


def _record(where: str, config: Mapping[str, Any], size: int) -> ImageProcessorRecord:
    found: list[tuple[str, object, object]] = [(step, config.get(step, True), True) for step in _STEPS]
    found += [
        ("size", _shortest_edge(config), size),
        ("crop_size", _square(config), size),
        ("resample", config.get("resample", _BICUBIC), _BICUBIC),
        ("rescale_factor", round(255 * float(config.get("rescale_factor", 1 / 255)), 6), 1.0),
    ]
    for option, its, expected in found:
        if its != expected:
            raise IpaError(
                f"{where}: {option} is {config.get(option)!r}, which is not supported; pictures of this image encoder "
                f"are resized (bicubic, shortest edge {size}), cropped to {size}x{size}, rescaled and normalised"
            )
    for name in _CLASSES:
        if not str(config.get(name, "CLIP")).startswith("CLIP"):
            raise IpaError(f"{where}: {name} is {config[name]!r}, which is not supported; expected CLIPImageProcessor")
    mean, std = (_triple(where, config, *default) for default in (("image_mean", _CLIP_MEAN), ("image_std", _CLIP_STD)))
    if 0 in std:
        raise IpaError(f"{where}: image_std is {config['image_std']!r}, which nothing can be divided by")
    return ImageProcessorRecord(size, mean, std)


def _shortest_edge(config: Mapping[str, Any]) -> object:
    """A number, or that of a mapping; with height and width, pictures would lose their proportions."""
    size = config.get("size", _CLIP_SIZE)
    return size.get("shortest_edge") if isinstance(size, dict) and len(size) == 1 else size


def _square(config: Mapping[str, Any]) -> object:
    """The edge of the crop, which is a number or a mapping."""
    size = config.get("crop_size", _CLIP_SIZE)
    is_square = isinstance(size, dict) and size.get("height") == size.get("width")
    return size.get("height") if is_square else size


def _triple(where: str, config: Mapping[str, Any], name: str, default: tuple[float, ...]) -> tuple[float, float, float]:
    values = config.get(name, default)
    numbers = list(values) if isinstance(values, list | tuple) else []
    if len(numbers) != 3 or not all(isinstance(one, int | float) and math.isfinite(one) for one in numbers):
        raise IpaError(f"{where}: {name} is {values!r}, expected three numbers, for red, green and blue")
    red, green, blue = map(float, numbers)
    return red, green, blue
