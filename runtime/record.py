"""What a picture says of how it was made, and the files that say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ipa.engines.bundle import hash_file
from ipa.engines.errors import RequestError
from ipa.runtime.image_files import check_file
from ipa.runtime.metadata import pnginfo
from ipa.runtime.output import write_png
from ipa.runtime.pipeline import Pipeline, Result
from ipa.runtime.request import Request
from ipa.runtime.request_record import request_record


def origin(pipeline: Pipeline, request: Request, bundle: Path | None) -> dict[str, Any]:
    """What else decided the pictures: models and files by hash, the engine.

    Args:
        request: resolved or not.
        bundle: as the user named it; `None`: the demo bundle.
    Raises:
        RequestError: a file that the request names cannot be read.
    """
    from importlib.metadata import version

    return {
        "bundle": None if bundle is None else str(bundle),
        "files": file_hashes(request),
        "models": pipeline.models(request),
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


def file_hashes(request: Request) -> dict[str, str]:
    """sha256 of every file that a request is made with, by its path as the request has it.

    Raises:
        RequestError: a file cannot be read, or is too large for a picture.
    """
    prompts = request.all_image_prompts
    found = [picture for prompt in prompts for picture in (*prompt.images, *prompt.masks, prompt.embeds)]
    found += [request.init_image, request.mask_image, *(control.image for control in request.controls)]
    return {str(path): _file_hash(Path(path)) for path in found if isinstance(path, str | Path)}


def _file_hash(path: Path) -> str:
    try:
        check_file(path)
        return hash_file(path)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror or 'cannot be read'}") from error
