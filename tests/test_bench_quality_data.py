"""Layouts of data, and pictures that are drawn once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tiny_eyes import coco, picture

from ipa.benchmarks.quality_data import Data, Item, read_data
from ipa.benchmarks.quality_pictures import LOG_FILE, ArmFolder, Drawn, Job, remove_arms
from ipa.engines.errors import IpaError
from ipa.runtime.request import Request


def read(data: Path | str, limit: int | None = None) -> Data:
    return read_data(str(data), None, limit, lambda text: None)


def test_coco_has_the_first_caption_of_each_image(tmp_path: Path) -> None:
    for place in ("captions_val2017.json", "annotations/captions_val2017.json"):
        folder = coco(tmp_path / place.replace("/", "-"), 3, place)
        items = read(folder).items
        assert [item.text for item in items] == ["a cat on the grass", "a red dog", "photo of a house"]
        assert [item.id for item in items] == [f"{number:012}" for number in (10, 11, 12)]
        assert items[1].reference == items[1].real == folder / "val2017" / "000000000011.jpg"


def test_broken_images_are_left_out_and_named(tmp_path: Path) -> None:
    folder, told = coco(tmp_path / "coco", 5), []
    (folder / "val2017" / "000000000010.jpg").write_bytes(b"no picture")
    (folder / "val2017" / "000000000012.jpg").unlink()
    data = read_data(str(folder), None, 2, told.append)
    assert [(item.id[-2:], item.number) for item in data.items] == [("11", 1), ("13", 3)]  # the seed is the place
    assert len(data.skipped) == 2 and [f"skipped {reason}" for reason in data.skipped] == told
    assert "000000000010.jpg: not a picture" in told[0] and "000000000012.jpg: No such file" in told[1]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_files_as_the_trainer_takes_them(suffix: str, tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "r.png"):
        picture(len(name) + ord(name[0])).save(tmp_path / name)
    records = [{"image_file": "a.png", "text": "a cat, red"}, {"image_file": "b.png", "text": "a dog"}]
    if suffix != "csv":
        records[1]["reference_file"] = "r.png"
    file = tmp_path / f"data.{suffix}"
    texts = {
        "json": json.dumps(records),
        "jsonl": "\n".join(map(json.dumps, records)),
        "csv": 'dir,text\na.png,"a cat, red"\nb.png,a dog\n',
    }
    file.write_text(texts[suffix])
    first, second = read(file).items
    assert (first.id, first.text, first.reference, first.real) == ("000000", "a cat, red", *[tmp_path / "a.png"] * 2)
    assert (second.reference.name, second.real.name) == ("b.png" if suffix == "csv" else "r.png", "b.png")


def test_an_image_root_for_data_without_is_refused(tmp_path: Path) -> None:
    for data in ("demo", str(coco(tmp_path / "coco"))):
        with pytest.raises(
            IpaError, match=f"--image-root goes with a .json, .jsonl or .csv file, not with --data {data}"
        ):
            read_data(data, tmp_path, None, lambda text: None)


def test_the_demos_pairs() -> None:
    data = read("demo", 3)
    assert [item.text for item in data.items] == [pair.prompt for pair in data.pairs] and len(data.items) == 3
    assert len({item.sha256 for item in data.items}) == 3


def bad_captions(content: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        coco(folder)
        (folder / "captions_val2017.json").write_text(json.dumps(content))
        return folder

    return make


BAD = {
    "no such file or folder": lambda folder: folder,
    "expected COCO's val2017/ and captions_val2017.json": lambda folder: folder.mkdir() or folder,
    "is not COCO's list of images and annotations": bad_captions([1, 2]),
    "has no captions for its images": bad_captions({"images": [{"id": 1, "file_name": "a"}], "annotations": []}),
    "is not a plain file name": bad_captions(
        {"images": [{"id": 1, "file_name": "../a.jpg"}], "annotations": [{"image_id": 1, "caption": "a cat"}]}
    ),
    "there are two images 'a'": bad_captions(
        {"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.png"}], "annotations": []}
    ),
    "none of its 1 images can be read": bad_captions(
        {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "a cat"}]}
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_data_is_one_message(message: str, tmp_path: Path) -> None:
    with pytest.raises(IpaError, match=message):
        read(BAD[message](tmp_path / "data"))


def jobs(count: int, text: str = "a cat") -> list[Job]:
    return [
        Job(Item(i, f"{i:02}", text, picture(i), picture(i), str(i)), Request(prompt=text, seed=i, num_images=2))
        for i in range(count)
    ]


def draw(request: Request) -> list[Image.Image]:
    assert request.seed is not None
    return [picture(100 * request.seed + sample) for sample in range(request.num_images)]


def drawn(folder: Path, some: list[Job], draw: Callable[[Request], list[Image.Image]] = draw) -> Drawn:
    arm = ArmFolder(folder, {"steps": 4})
    arm.check(some)
    return arm.draw(some, draw)


def pixels(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.png"))}


def test_drawing_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert [[file.name for file in files] for files in drawn(whole, jobs(5)).files][4] == ["04-0.png", "04-1.png"]
    seen: list[int | None] = []

    def stopped(request: Request) -> list[Image.Image]:
        seen.append(request.seed)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return draw(request)

    with pytest.raises(KeyboardInterrupt):
        drawn(parts, jobs(5), stopped)
    assert not list(parts.glob(".*")) and len(pixels(parts)) == 4
    (parts / "00-1.png").unlink()  # as if it had been lost
    with (parts / LOG_FILE).open("a") as log:
        log.write('\n{"id": "02", "sha')  # as if killed while it wrote
    drawn(parts, jobs(5), stopped)
    assert seen == [0, 1, 2, 0, 2, 3, 4] and pixels(parts) == pixels(whole)
    drawn(parts, jobs(5), stopped)
    assert len(seen) == 7  # nothing is left
    drawn(parts, jobs(6), stopped)
    assert seen[7:] == [5]  # more of the same data may follow


def test_pictures_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    folder = tmp_path / "pictures" / "engine"
    ArmFolder(folder, {"steps": 8}).check(jobs(2))
    drawn(folder, jobs(2))  # nothing had been drawn with 8 steps
    with pytest.raises(IpaError, match=r"steps was 4 and is 5; choose another --output, or start over with --force"):
        ArmFolder(folder, {"steps": 5}).check(jobs(2))
    with pytest.raises(IpaError, match="the text, image or seed of 00 has changed"):
        ArmFolder(folder, {"steps": 4}).check(jobs(2, "a dog"))


def test_only_folders_of_arms_are_deleted(tmp_path: Path) -> None:
    engine, mine, other, broken = (tmp_path / name for name in ("engine", "mine", "base", "sweep"))
    drawn(engine, jobs(1))
    for folder, settings in ((mine, {"steps": 4}), (other, {"editor": "dark"})):
        folder.mkdir()
        (folder / "settings.json").write_text(json.dumps(settings))
    broken.mkdir()
    (broken / "settings.json").write_text("[")
    remove_arms([engine, other, broken, tmp_path / "none"], ["steps"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "mine", "sweep"]
