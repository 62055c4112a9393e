"""Requests from a JSONL file: one JSON object a line, with an `id` and any fields of `Request`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipa.engines.errors import RequestError
from ipa.runtime.image_prompt import ImagePrompt
from ipa.runtime.prompt_fields import PromptFields, has_pictures, laid_over, prompts_of
from ipa.runtime.request import Request
from ipa.runtime.request_record import REQUEST_FIELDS, recorded_fields, request_from

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_ALIASES = {"num_samples": "num_images", "steps": "num_inference_steps"}
_FIELDS = REQUEST_FIELDS - {"only"}


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


def read_lines(path: Path, defaults: Mapping[str, Any], prompts: Sequence[PromptFields] = ()) -> list[RequestLine]:
    """Every line that is not blank.

    Args:
        path: the file; relative image paths count from its folder.
        defaults: fields of `Request` for lines that do not name them.
        prompts: the same of image prompts; they do not count for a line with `image_prompts` of its own.
    Raises:
        RequestError: the file is missing, empty or no text.
    """
    try:
        texts = path.read_text("utf-8-sig").split("\n")  # `splitlines` also cuts at U+2028, which JSON allows
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise RequestError(f"--requests {path}: cannot be read: {reason}") from error
    lines = list(_parsed(texts, path.parent, defaults, prompts))
    if not lines:
        raise RequestError(f'--requests {path}: is empty; write lines such as {{"id": "1", "prompt": "a cat"}}')
    return lines


def picture_names(id: str, count: int) -> list[str]:
    """The files of a request's pictures."""
    return [f"{id}.png"] if count == 1 else [f"{id}-{index}.png" for index in range(count)]


def _parsed(
    texts: list[str], folder: Path, defaults: Mapping[str, Any], prompts: Sequence[PromptFields]
) -> Iterator[RequestLine]:
    ids: dict[str, int] = {}
    files: dict[str, int] = {}
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        name = str(number)
        try:
            record = _record(text)
            name = _name(record, number)
            if name in ids:
                raise RequestError(f"the id {name!r} is that of line {ids[name]}, too")
            ids[name] = number
            request = _request(record, folder, defaults, prompts)
            for file in picture_names(name, request.num_images):
                taken = files.setdefault(file.lower(), number)  # some file systems take `A` for `a`
                if taken != number:
                    raise RequestError(f"the picture {file} would be that of line {taken}, too; choose another id")
            yield RequestLine(number, name, request)
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


def _request(
    record: dict[str, Any], folder: Path, defaults: Mapping[str, Any], prompts: Sequence[PromptFields]
) -> Request:
    record.pop("id", None)
    unknown = sorted(set(record) - _FIELDS)
    if unknown:
        raise RequestError(f"{unknown[0]!r} is no field of a request; there are {', '.join(sorted(_FIELDS))}")
    own = recorded_fields(record, folder)
    return request_from({**defaults, **own}, _prompts(own, prompts))


def _prompts(own: Mapping[str, Any], defaults: Sequence[PromptFields]) -> list[PromptFields]:
    """The image prompts of a line, over those of the command where it shows an image."""
    named = prompts_of(own)
    for prompt in own.get("image_prompts", ()):
        ImagePrompt(**prompt)  # each must show an image by itself
    if "image_prompts" in own or ("image" in own and (own["image"] is None or len(defaults) > 1)):
        return named
    found = laid_over(defaults, named)
    return found if any(map(has_pictures, found)) else named
