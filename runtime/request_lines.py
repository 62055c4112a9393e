"""Requests from a JSONL file: one JSON object a line, with an `id` and any fields of `Request`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ipa.engines.errors import RequestError
from ipa.runtime.control_image import ControlImage
from ipa.runtime.image_prompt import ImagePrompt
from ipa.runtime.request import Request

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_ALIASES = {"num_samples": "num_images", "steps": "num_inference_steps"}
_FIELDS = frozenset(Request.__dataclass_fields__) - {"only"}


@dataclass(frozen=True)
class RequestLine:
    """One line of the file.

    Attributes:
        number: from 1.
        id: names the pictures; the line's number where it has none.
        request: `None` where the line is bad.
        problem: why it is bad; empty where it is not.
    """

    number: int
    id: str
    request: Request | None
    problem: str = ""


def read_lines(path: Path, defaults: Mapping[str, Any]) -> list[RequestLine]:
    """Every line that is not blank.

    Args:
        path: the file; relative image paths count from its folder.
        defaults: fields of `Request` for lines that do not name them.
    Raises:
        RequestError: the file is missing, empty or no text.
    """
    try:
        texts = path.read_text("utf-8-sig").split("\n")  # `splitlines` also cuts at U+2028, which JSON allows
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise RequestError(f"--requests {path}: cannot be read: {reason}") from error
    lines = list(_parsed(texts, path.parent, defaults))
    if not lines:
        raise RequestError(f'--requests {path}: is empty; write lines such as {{"id": "1", "prompt": "a cat"}}')
    return lines


def _parsed(texts: list[str], folder: Path, defaults: Mapping[str, Any]) -> Iterator[RequestLine]:
    seen: dict[str, int] = {}
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        name = str(number)
        try:
            record = _record(text)
            name = _name(record, number)
            if name in seen:
                raise RequestError(f"the id {name!r} is that of line {seen[name]}, too")
            seen[name] = number
            yield RequestLine(number, name, _request(record, folder, defaults))
        except RequestError as error:
            yield RequestLine(number, name, None, str(error))


def _record(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise RequestError("is not a JSON object")
    return {_ALIASES.get(str(key), str(key)): value for key, value in record.items()}


def _name(record: Mapping[str, Any], number: int) -> str:
    name = str(record.get("id", number))
    if not _ID.fullmatch(name):
        raise RequestError(f"the id {name!r} names files: it may hold letters, digits, '_', '-' and '.'")
    return name


def _request(record: dict[str, Any], folder: Path, defaults: Mapping[str, Any]) -> Request:
    record.pop("id", None)
    unknown = sorted(set(record) - _FIELDS)
    if unknown:
        raise RequestError(f"{unknown[0]!r} is no field of a request; there are {', '.join(sorted(_FIELDS))}")
    for name in ("image", "init_image", "mask_image"):
        if isinstance(record.get(name), str):
            record[name] = str(folder / record[name])
    if "image_prompts" in record:
        prompts = record["image_prompts"]
        if not isinstance(prompts, list):
            raise RequestError("image_prompts is not a list")
        record["image_prompts"] = tuple(_prompt(prompt, folder) for prompt in prompts)
    if "controls" in record:
        controls = ControlImage.from_records(record["controls"])
        record["controls"] = tuple(replace(control, image=str(folder / str(control.image))) for control in controls)
    own_image = {"image", "image_prompts"} & set(record)
    given = {name: value for name, value in defaults.items() if not own_image or name not in ("image", "image_prompts")}
    request = Request(**given | record)
    if not request.prompt and not request.has_image and not request.controls:
        raise RequestError("nothing to draw from: give a prompt, an image or both")
    return request


def _prompt(record: object, folder: Path) -> ImagePrompt:
    if not isinstance(record, dict):
        return ImagePrompt.from_record(record)
    pictures = {name: record[name] for name in ("images", "masks") if isinstance(record.get(name), list)}
    from_here = {
        name: [str(folder / one) if isinstance(one, str) else one for one in ones] for name, ones in pictures.items()
    }
    embeds = {"embeds": str(folder / record["embeds"])} if isinstance(record.get("embeds"), str) else {}
    return ImagePrompt.from_record({**record, **from_here, **embeds})
