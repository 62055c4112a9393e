"""The image encoder: a CLIP vision model with projection, by itself or in a whole CLIP model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ipa.engines.errors import IpaError
from ipa.export.source import Source, reading

_WIDTH = "projection_dim"  # of `image_embeds`
_SIZES = ("image_size", "patch_size", "hidden_size", _WIDTH)  # that graphs are made of


def read_image_config(source: Source, part: str) -> dict[str, Any]:
    """The vision model's configuration, with the defaults of what the file leaves out.

    Args:
        source: of the model.
        part: its sub-folder there.
    Raises:
        IpaError: there is none, or it is malformed.
    """
    from transformers import CLIPVisionConfig

    file = f"{part}/config.json".lstrip("/")
    whole = source.json(file)
    if whole is None:
        raise IpaError(f"image encoder {source} has no config.json")
    with reading(f"{source}/{file}"):
        # A whole CLIP model, as most are published, has its vision model's sizes one level down, but for one.
        config = {**(whole.get("vision_config") or whole)}
        config |= {_WIDTH: whole[_WIDTH]} if _WIDTH in whole else {}
        found: dict[str, Any] = CLIPVisionConfig.from_dict(config).to_dict()
        for size in _SIZES:
            found[size] = int(found[size])
    return found


def load_image_encoder(source: Source, part: str, config: Mapping[str, Any]) -> Any:
    """The `CLIPVisionModelWithProjection`; `config` is what `read_image_config` gave."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    given = CLIPVisionConfig.from_dict(dict(config))
    return source.load(CLIPVisionModelWithProjection.from_pretrained, part, config=given)
