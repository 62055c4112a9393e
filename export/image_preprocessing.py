"""How pictures are prepared for the image encoder, of the files that say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ipa.engines.errors import IpaError
from ipa.engines.manifest import ImageProcessorRecord

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


def image_processor(source: object, size: int, *configs: Mapping[str, Any] | None) -> ImageProcessorRecord:
    """CLIP preprocessing: the first configuration for pictures of that size, else CLIP's values.

    Args:
        source: of the pipeline, for messages.
        size: side of the pictures that the image encoder takes.
        *configs: contents of `preprocessor_config.json`; `None` where there is no such file.
    Raises:
        IpaError: pictures are resized in another way.
    """
    for config in configs:
        if config is not None and _edge(config.get("crop_size")) == _edge(config.get("size")) == size:
            if config.get("resample", _BICUBIC) != _BICUBIC:
                raise IpaError(f"{source}: images are not resized bicubically, which is not supported yet")
            mean, std = config.get("image_mean", _CLIP_MEAN), config.get("image_std", _CLIP_STD)
            return ImageProcessorRecord(size, _triple(mean), _triple(std))
    return ImageProcessorRecord(size, _CLIP_MEAN, _CLIP_STD)


def _edge(size: Any) -> int | None:
    """The edge of a processor's `size` or `crop_size`, which come as a number or as a mapping."""
    if isinstance(size, dict):
        edges = {size[key] for key in ("shortest_edge", "height", "width") if key in size}
        return edges.pop() if len(edges) == 1 else None
    return size if isinstance(size, int) else None


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
