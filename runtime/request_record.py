"""A request as JSON values, as pictures carry it and files of requests hold it, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ipa.engines.errors import RequestError
from ipa.runtime.control_image import ControlImage
from ipa.runtime.image_prompt import ImagePrompt
from ipa.runtime.prompt_fields import IMAGE_FIELDS, PromptFields, request_fields
from ipa.runtime.request import Request

REQUEST_FIELDS = frozenset(item.name for item in fields(Request))
_PICTURES = ("image", "init_image", "mask_image")


def request_record(request: Request) -> dict[str, Any]:
    """A request as JSON values; a picture that came from no file is left out."""
    record = {item.name: getattr(request, item.name) for item in fields(request)}
    for name in _PICTURES:
        picture = getattr(request, name)
        record[name] = str(picture) if isinstance(picture, str | Path) else None
    record["image_prompts"] = [prompt.record() for prompt in request.image_prompts]
    record["controls"] = [control.record() for control in request.controls]
    return record


def recorded_fields(record: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Fields of `Request` from JSON values; of its `image_prompts`, those that are named.

    Args:
        record: as `request_record` made it, or written by hand with fewer fields; other keys are passed over.
        folder: that relative paths count from; `None`: they stay as they are.
    Raises:
        RequestError: image prompts or control images are none.
    """
    found = {name: value for name, value in record.items() if name in REQUEST_FIELDS}
    found |= {name: _placed(found[name], folder) for name in _PICTURES if name in found}
    if "image_prompts" in found:
        if not isinstance(found["image_prompts"], list):
            raise RequestError(f"image_prompts is {found['image_prompts']!r}, expected a list; give --image yourself")
        found["image_prompts"] = [_prompt(one, folder) for one in found["image_prompts"]]
    if "controls" in found:
        controls = ControlImage.from_records(found["controls"])
        found["controls"] = tuple(replace(control, image=_placed(control.image, folder)) for control in controls)
    return found


def request_from(given: Mapping[str, Any], prompts: Sequence[PromptFields]) -> Request:
    """The request of some fields, its image prompts in place of those among them.

    Raises:
        RequestError: a field does not fit, or there is nothing to draw from.
    """
    others = {name: value for name, value in given.items() if name not in IMAGE_FIELDS}
    request = Request(**others, **request_fields(prompts))
    if not request.prompt and not request.has_image and not request.controls:
        raise RequestError("nothing to draw from: give a prompt, an image or both")
    return request


def _prompt(record: object, folder: Path | None) -> PromptFields:
    return {
        name: _placed(value, folder) if name in ("images", "masks", "embeds") else value
        for name, value in ImagePrompt.recorded_fields(record).items()
    }


def _placed(value: Any, folder: Path | None) -> Any:
    """Paths from a folder; what is none stays."""
    if isinstance(value, tuple):
        return tuple(_placed(one, folder) for one in value)
    return str(folder / value) if folder is not None and isinstance(value, str) else value
