"""What `ipa-bench quality` draws: image prompts with texts, from COCO, the trainer's files or the demo's own pairs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ipa.engines.bundle import hash_file
from ipa.engines.errors import IpaError, RequestError
from ipa.runtime.image_files import open_image
from ipa.trainer.data import read_records
from ipa.trainer.demo.evaluate import PAIRS, Pair, held_out_pairs
from ipa.trainer.errors import TrainError

DEMO = "demo"
COCO_IMAGES, COCO_CAPTIONS = "val2017", "captions_val2017.json"
_CAPTION_PLACES = (COCO_CAPTIONS, f"annotations/{COCO_CAPTIONS}")

Picture = Path | Image.Image


@dataclass(frozen=True)
class Item:
    """One image prompt with its text.

    Attributes:
        number: its place in the data, from 0, broken ones counted; the seed of its pictures.
        id: names its pictures.
        text: what the picture shows.
        reference: the image prompt.
        real: the data's picture, which FID compares with; mostly the image prompt itself.
        sha256: of the image prompt.
    """

    number: int
    id: str
    text: str
    reference: Picture
    real: Picture
    sha256: str


@dataclass(frozen=True)
class Data:
    """The items of a run.

    Attributes:
        name: as the user gave it.
        layout: how it was read, in words.
        skipped: why items that cannot be used were left out, one line each.
        pairs: what the demo's judge asks for, one per item; of other data none.
    """

    name: str
    layout: str
    items: list[Item]
    skipped: list[str]
    pairs: list[Pair]


@dataclass(frozen=True)
class _Entry:
    id: str
    text: str
    reference: Path
    real: Path


def read_data(data: str, image_root: Path | None, limit: int | None, report: Callable[[str], None]) -> Data:
    """Read data and check its images.

    Args:
        data: `demo`; a folder as COCO 2017 has it; a `.json`, `.jsonl` or `.csv` file as `ipa-train` takes it.
        image_root: that the paths of such a file count from, of other data `None`; `None`: the file's own folder.
        limit: take the first so many usable ones.
        report: told of each one that is left out.
    Raises:
        IpaError: there is no such data, it is malformed, or none of it can be used.
    """
    path = Path(data)
    if image_root is not None and (data == DEMO or path.is_dir()):
        raise IpaError(f"--image-root goes with a .json, .jsonl or .csv file, not with --data {data}: leave it out")
    if data == DEMO:
        return _demo(limit)
    if path.is_dir():
        layout, entries = "COCO, the first caption of each image", _coco(path)
    elif path.is_file():
        layout, entries = f"{path.suffix.lower().lstrip('.')} as ipa-train reads it", _listed(path, image_root)
    else:
        raise IpaError(
            f"--data {path}: no such file or folder; give a folder with {COCO_IMAGES}/ and {COCO_CAPTIONS}, "
            "a .json, .jsonl or .csv file, or demo"
        )
    items, skipped = _usable(entries, limit, report)
    if not items:
        raise IpaError(f"--data {path}: none of its {len(skipped)} images can be read; the first: {skipped[0]}")
    return Data(data, layout, items, skipped, [])


def _usable(entries: list[_Entry], limit: int | None, report: Callable[[str], None]) -> tuple[list[Item], list[str]]:
    items: list[Item] = []
    skipped: list[str] = []
    with tqdm(total=limit or len(entries), desc="check images", unit="image", disable=None, leave=False) as bar:
        for number, entry in enumerate(entries):
            if len(items) == limit:
                break
            try:
                for file in {entry.reference, entry.real}:
                    open_image(file)
            except RequestError as error:
                skipped.append(str(error))
                report(f"skipped {error}")
                continue
            items.append(Item(number, entry.id, entry.text, entry.reference, entry.real, hash_file(entry.reference)))
            bar.update()
    return items, skipped


def _listed(path: Path, image_root: Path | None) -> list[_Entry]:
    try:
        records = read_records(path, image_root or path.parent)
    except TrainError as error:
        raise IpaError(str(error)) from error
    return [_Entry(f"{i:06}", one.text, one.reference, one.image) for i, one in enumerate(records)]


def _coco(folder: Path) -> list[_Entry]:
    images = folder / COCO_IMAGES
    file = next((folder / place for place in _CAPTION_PLACES if (folder / place).is_file()), None)
    if not images.is_dir() or file is None:
        raise IpaError(
            f"--data {folder}: expected COCO's {COCO_IMAGES}/ and {COCO_CAPTIONS} (also in annotations/) in it; "
            "for other pictures give a .json, .jsonl or .csv file"
        )
    try:
        content = json.loads(file.read_text("utf-8"))
        entries = list(_coco_entries(content, images))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise IpaError(f"{file} is not COCO's list of images and annotations ({reason}); download it again") from error
    if not entries:
        raise IpaError(f"{file} has no captions for its images; {COCO_CAPTIONS} is the file that has")
    return entries


def _coco_entries(content: dict[str, Any], images: Path) -> Iterator[_Entry]:
    """In the order of the file's images, those without caption left out; the first annotation is the caption."""
    captions: dict[int, str] = {}
    stems: set[str] = set()
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], str(annotation.get("caption", "")).strip())
    for image in content["images"]:
        name = str(image["file_name"])
        if name in (".", "..", "") or "\0" in name or "\\" in name or Path(name).name != name:
            raise ValueError(f"file_name {name[:120]!r} is not a plain file name")
        if Path(name).stem in stems:
            raise ValueError(f"there are two images {Path(name).stem!r}")
        stems.add(Path(name).stem)
        if caption := captions.get(image["id"]):
            yield _Entry(Path(name).stem, caption, images / name, images / name)


def _demo(limit: int | None) -> Data:
    pairs = held_out_pairs(min(limit or PAIRS, PAIRS))
    items = [
        Item(i, f"{i:02}", pair.prompt, pair.reference, pair.reference, _pixels_sha256(pair.reference))
        for i, pair in enumerate(pairs)
    ]
    return Data(
        DEMO, "held-out pairs of the demo: a text that names a shape, another shape as image prompt", items, [], pairs
    )


def _pixels_sha256(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()
