"""Training records: which image, which text, which reference image.

* ``.json``: a list of ``{"image_file": ..., "text": ..., "reference_file": ...}``; ``reference_file`` is optional.
* ``.jsonl``: one such object a line.
* ``.csv``: header ``dir,text``, quoted as CSV should be, or unquoted with commas in the text.

The image prompt of a record is its reference image, or its own image when it names none.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ipa.trainer.errors import TrainError


@dataclass(frozen=True)
class Record:
    """One training example; the paths are complete."""

    image: Path
    text: str
    reference: Path


def read_records(data: Path, image_root: Path) -> list[Record]:
    """All records of a data file; the images themselves are not opened.

    Raises:
        TrainError: the file is missing, empty or malformed, or a path leaves ``image_root``.
    """
    if not image_root.is_dir():
        raise TrainError(f"--image-root {image_root} is not a folder")
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv}
    reader = readers.get(data.suffix.lower())
    if reader is None:
        raise TrainError(f"--data {data}: expected a .json, .jsonl or .csv file")
    try:
        # utf-8-sig also takes the byte-order mark that spreadsheet programs write
        text = data.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TrainError(f"--data {data} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TrainError(f"--data {data} is not UTF-8 text") from error
    records = [_record(entry, image_root, f"{data}, {place}") for place, entry in reader(text, data)]
    if not records:
        raise TrainError(f"--data {data} holds no records")
    return records


def _read_json(text: str, data: Path) -> Iterator[tuple[str, Any]]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TrainError(f"--data {data} is not JSON: {error}") from error
    if not isinstance(entries, list):
        raise TrainError(f"--data {data}: expected a JSON list of records, found {type(entries).__name__}")
    for number, entry in enumerate(entries, start=1):
        yield f"record {number}", entry


def _read_jsonl(text: str, data: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TrainError(f"--data {data}, line {number} is not JSON: {error}") from error
        yield f"line {number}", entry


def _read_csv(text: str, data: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a ``dir,text`` file. A row that is not two proper fields is split on its first comma instead."""
    lines = text.splitlines(keepends=True)
    header, rows = lines[:1], lines[1:]
    if [name.strip() for name in "".join(header).split(",")] != ["dir", "text"]:
        raise TrainError(f"--data {data}: expected the header 'dir,text', found {''.join(header).strip()[:80]!r}")
    reader = csv.reader(rows, strict=True)
    start = 0
    while start < len(rows):
        try:
            fields = next(reader, [])
        except csv.Error:
            fields = []
        end = reader.line_num
        if len(fields) != 2 and end - start == 1:
            fields = [field.strip() for field in rows[start].split(",", maxsplit=1)]
        if len(fields) == 2:
            yield f"line {start + 2}", {"image_file": fields[0], "text": fields[1]}
        elif end - start > 1 or rows[start].strip():
            raise TrainError(f"--data {data}, line {start + 2}: expected 'dir,text' with balanced quotes")
        start = end


def _record(entry: Any, image_root: Path, place: str) -> Record:
    if not isinstance(entry, dict):
        raise TrainError(f"{place}: expected an object with image_file and text, found {type(entry).__name__}")
    for key in ("image_file", "text"):
        if not isinstance(entry.get(key), str):
            raise TrainError(f"{place}: expected {key!r} to be a string, found {type(entry.get(key)).__name__}")
    image = _inside(image_root, entry["image_file"], place)
    reference = entry.get("reference_file")
    if reference is None:
        return Record(image, entry["text"], image)
    if not isinstance(reference, str):
        raise TrainError(f"{place}: expected 'reference_file' to be a string, found {type(reference).__name__}")
    return Record(image, entry["text"], _inside(image_root, reference, place))


def _inside(image_root: Path, relative: str, place: str) -> Path:
    """The path below ``image_root``. A data file from elsewhere must not name files outside of it."""
    parts = PurePosixPath(relative).parts
    absolute = PurePosixPath(relative).is_absolute() or PureWindowsPath(relative).anchor != ""
    if not parts or absolute or ".." in parts or "\0" in relative:
        raise TrainError(f"{place}: path {relative[:120]!r} is not a relative path below --image-root")
    return image_root / relative
