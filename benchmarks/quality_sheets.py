"""Contact sheets: a row for each image prompt, a column for each way to draw."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ipa.trainer.files import atomic_path

CELL, GAP, LABEL, TEXT = 128, 6, 22, 110  # pixels: a picture, between them, the titles' row, the texts' column
_LINE, _LETTERS, _LINES = 15, 16, 8  # of a text: pixels a line, letters a line, lines


@dataclass(frozen=True)
class Row:
    """A text and its image prompt."""

    text: str
    reference: Image.Image


def contact_sheet(rows: Sequence[Row], columns: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Texts, image prompts, and under each title a picture of each row; pictures of other shapes are cropped."""
    font, small = ImageFont.load_default(size=14), ImageFont.load_default(size=12)
    titles = ["image prompt", *columns]
    size = (TEXT + len(titles) * (CELL + GAP), LABEL + len(rows) * (CELL + GAP))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for index, title in enumerate(titles):
        pen.text((TEXT + index * (CELL + GAP), 3), title, "black", font)
    for index, row in enumerate(rows):
        top = LABEL + index * (CELL + GAP)
        lines = textwrap.wrap(f'"{row.text}"', _LETTERS, max_lines=_LINES, placeholder=" ...")
        first = top + (CELL - _LINE * len(lines)) // 2
        for number, line in enumerate(lines):
            pen.text((6, first + number * _LINE), line, "black", small)
        for place, image in enumerate([row.reference, *(images[index] for images in columns.values())]):
            sheet.paste(ImageOps.fit(image, (CELL, CELL)), (TEXT + place * (CELL + GAP), top))
    return sheet


def save_sheet(sheet: Image.Image, file: Path) -> None:
    """Write it as PNG, whole or not at all."""
    with atomic_path(file) as partial:
        sheet.save(partial, "PNG", optimize=True)
