"""What a picture says of how it was made, and the files that say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ipa.engines.bundle import hash_file
from ipa.runtime.image_prompt import ImageSource
from ipa.runtime.metadata import pnginfo
from ipa.runtime.output import write_png
from ipa.runtime.pipeline import Pipeline, Result
from ipa.runtime.request import Request


def request_record(request: Request) -> dict[str, Any]:
    """A request as JSON values; a picture that came from no file is left out."""
    record = {item.name: getattr(request, item.name) for item in fields(request)}
    for name in ("image", "init_image", "mask_image"):
        picture = getattr(request, name)
        record[name] = str(picture) if isinstance(picture, str | Path) else None
    record["image_prompts"] = [prompt.record() for prompt in request.image_prompts]
    record["controls"] = [control.record() for control in request.controls]
    return record


def origin(pipeline: Pipeline, request: Request, bundle: Path | None) -> dict[str, Any]:
    """What else decided the pictures: models by hash, the engine, and the images' content.

    Args:
        bundle: as the user named it; `None`: the demo bundle.
    """
    return {
        "bundle": None if bundle is None else str(bundle),
        **image_hashes(request),
        "unet_sha256": pipeline.manifest.components["unet"].files[-1].sha256,
        "engine": pipeline.engine,
        "version": version("ipa-runtime"),
    }


def write_pictures(result: Result, paths: Sequence[Path], about: Mapping[str, Any] | None) -> None:
    """Write a result's pictures, each with a request that makes it again.

    Args:
        about: the `origin`; `None`: without metadata.
    Raises:
        RequestError: one cannot be written.
    """
    for index, (image, path) in enumerate(zip(result.images, paths, strict=True)):
        info = None
        if about is not None:
            only = index if result.request.only is None and len(paths) > 1 else result.request.only
            info = pnginfo({**request_record(replace(result.request, only=only)), **about})
        write_png(image, path, info)


def image_hashes(request: Request) -> dict[str, Any]:
    """Of every picture that a request is made with, by the name it has in the record."""
    return {
        "image_sha256": _prompt_hash(request),
        "init_image_sha256": _file_hash(request.init_image),
        "mask_image_sha256": _file_hash(request.mask_image),
        "controls_sha256": [_file_hash(control.image) for control in request.controls],
    }


def _prompt_hash(request: Request) -> str | list[str | None] | None:
    """Of the image; where there are several prompts, of all their images and masks."""
    if not request.image_prompts:
        return _file_hash(request.image)
    return [_file_hash(picture) for prompt in request.image_prompts for picture in (*prompt.images, *prompt.masks)]


def _file_hash(picture: ImageSource | None) -> str | None:
    path = Path(picture) if isinstance(picture, str | Path) else None
    return hash_file(path) if path is not None and path.is_file() else None
