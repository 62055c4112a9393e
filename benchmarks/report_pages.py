"""From a folder of records to `report.md` and `report.html`."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from ipa.benchmarks.records import QualityRecord, Record, SpeedRecord, read_record
from ipa.benchmarks.report_parts import Picture, Section
from ipa.benchmarks.report_plots import sweep_size
from ipa.benchmarks.report_quality import quality_section
from ipa.benchmarks.report_speed import speed_section
from ipa.benchmarks.report_terms import terms
from ipa.engines.errors import IpaError
from ipa.trainer.files import atomic_path

TEMPLATES = Path(__file__).parent / "templates"
NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")  # what UTF-8 or XML cannot hold
FOLDER = "report"  # of the Markdown page's pictures, beside it
SHEETS = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp"}  # formats of Pillow, kinds of picture


def read_records(folders: Sequence[Path]) -> list[tuple[Path, Record]]:
    """All records in folders, speed first, then by file name; other JSON files are left out.

    Raises:
        IpaError: a folder is missing, a record is damaged, or there is none.
    """
    found: dict[Path, tuple[Path, Record]] = {}
    others = 0
    for folder in folders:
        if not folder.is_dir():
            raise IpaError(
                f"{folder} is no folder: give --records the OUTPUT of `ipa-bench speed` or `ipa-bench quality`"
            )
        for file in sorted(folder.glob("[!.]*.json")):
            record = read_record(file)
            if record is None:
                others += 1
            else:
                _check(file, record)
                found[file.resolve()] = (file, record)
    if not found:
        kinds = f" ({others} JSON files of other kinds)" if others else ""
        names = ", ".join(map(str, folders))
        raise IpaError(
            f"{names}: no record{kinds}; run `ipa-bench speed` or `ipa-bench quality`, or name --records DIR"
        )
    return sorted(found.values(), key=lambda item: (isinstance(item[1], QualityRecord), item[0].name, str(item[0])))


def write_report(records: Sequence[tuple[Path, Record]], output: Path) -> list[Path]:
    """Write both pages and the Markdown page's pictures; return the pages.

    Args:
        records: with their files, as `read_records` gives them.
    Raises:
        IpaError: a contact sheet is missing or no picture, or the pages cannot be written.
    """
    sections = _sections(records)
    pages = {output / "report.md": _markdown(sections), output / "report.html": _html(sections)}
    try:
        (output / FOLDER).mkdir(parents=True, exist_ok=True)
        for picture in (picture for section in sections for picture in (*section.plots, *section.sheets)):
            with atomic_path(output / FOLDER / file_name(picture)) as temporary:
                temporary.write_bytes(_standalone(picture.data) if picture.kind == "svg" else picture.data)
        for file, text in pages.items():
            with atomic_path(file) as temporary:
                temporary.write_text(text, "utf-8")
    except OSError as error:
        raise IpaError(
            f"the report cannot be written to {output}: {error}; name another folder with --output"
        ) from error
    return list(pages)


def file_name(picture: Picture) -> str:
    """Of a picture beside the Markdown page."""
    return f"{picture.name}.{picture.kind}"


def _sections(records: Sequence[tuple[Path, Record]]) -> list[Section]:
    speeds = [(file.name, record) for file, record in records if isinstance(record, SpeedRecord)]
    sections: list[Section] = []
    for file, record in records:
        anchor = _anchor(file.stem, {section.anchor for section in sections})
        if isinstance(record, SpeedRecord):
            sections.append(speed_section(file.name, record, anchor))
        else:
            sections.append(quality_section(file.name, record, anchor, _sheets(file, record, anchor), speeds))
    titles = [section.title for section in sections]
    return [
        replace(section, title=f"{section.title} ({file.name})") if titles.count(section.title) > 1 else section
        for section, (file, _) in zip(sections, records, strict=True)
    ]


def _anchor(stem: str, taken: set[str]) -> str:
    """Letters, digits and hyphens, unlike all that are taken."""
    anchor = plain = re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-").lower() or "record"
    number = 1
    while anchor in taken:
        number += 1
        anchor = f"{plain}-{number}"
    return anchor


def _check(file: Path, record: Record) -> None:
    """What the types cannot tell: figures are finite, steps take time, names can be printed and are there once."""

    def refuse(what: str) -> None:
        kind = "speed" if isinstance(record, SpeedRecord) else "quality"
        raise IpaError(f"{file}: {what}; run `ipa-bench {kind}` again")

    for where, value in _leaves(asdict(record), ""):
        if isinstance(value, float) and not math.isfinite(value):
            refuse(f"'{where}' is {value}, expected a finite number")
        if isinstance(value, str) and NO_TEXT.search(value):
            refuse(f"'{where}' is {value!a}, expected characters that can be printed")
    if isinstance(record, SpeedRecord):
        names = [row.name for row in record.contenders]
        for row in record.contenders:
            step = row.step_seconds
            if min(step.low, step.value, step.high) <= 0:
                refuse(
                    f"the step of '{row.name}' takes {step.value} s ({step.low} to {step.high}), expected more than 0"
                )
    else:
        names = [arm.name for arm in record.arms]
        if sweep := record.sweep:
            lengths = {"scales": len(sweep.scales), "clip_i": len(sweep.clip_i)}
            lengths |= {} if sweep.clip_t is None else {"clip_t": len(sweep.clip_t)}
            if len(set(lengths.values())) > 1 or not sweep.scales:
                counts = ", ".join(f"{count} {name}" for name, count in lengths.items())
                refuse(f"'sweep' has {counts}; expected as many of each and at least one")
    for name in {name for name in names if names.count(name) > 1}:
        refuse(f"'{name}' is there more than once")


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Keys and values of a record, with the way to each."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield where, key
            yield from _leaves(item, f"{where}.{key}" if where else str(key))
    else:
        yield where, value


def _sheets(file: Path, record: QualityRecord, anchor: str) -> list[Picture]:
    """The contact sheets of a quality record: of its arms, and of its sweep."""
    found = []
    if sheet := record.setting.get("sheet"):
        caption = "Contact sheet: texts, image prompts, and what each arm drew of them from the same seeds."
        found.append(_sheet(file, str(sheet), f"{anchor}-arms-sheet", caption))
    if record.sweep:
        caption = "Contact sheet of the scale sweep: the engine's pictures at each ip_adapter_scale; "
        caption += f"{sweep_size(record.sweep)}."
        found.append(_sheet(file, record.sweep.sheet, f"{anchor}-sweep-sheet", caption))
    return found


def _sheet(record: Path, name: str, title: str, caption: str) -> Picture:
    """A contact sheet that lies beside its record.

    Raises:
        IpaError: it does not, or is no picture.
    """
    file = record.parent / name
    if Path(name).name != name or not file.is_file():
        raise IpaError(f"{record}: no contact sheet '{name}' beside it; run `ipa-bench quality` again")
    try:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data), formats=list(SHEETS)) as image:
            kind = SHEETS[str(image.format)]
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise IpaError(f"{file} cannot be read as PNG, JPEG or WebP; run `ipa-bench quality` again") from error
    return Picture(title, caption, kind, data)


def _environment() -> Environment:
    # Both templates escape: Markdown lets HTML through.
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"md": _plain_markdown, "code": _code_block, "inline": _inline, "file_name": file_name}
    return made


def _markdown(sections: Sequence[Section]) -> str:
    return (
        _environment().get_template("report.md.jinja").render(sections=sections, terms=terms(sections), folder=FOLDER)
    )


def _html(sections: Sequence[Section]) -> str:
    return _environment().get_template("report.html.jinja").render(sections=sections, terms=terms(sections))


def _plain_markdown(text: str) -> Markup:
    """Text in which Markdown and HTML find nothing to interpret; on one line."""
    kept = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markup(re.sub(r"([\\`*_\[\]|~$])", r"\\\1", kept))


def _code_block(text: str) -> Markup:
    """An indented block, which nothing in the text can end."""
    return Markup("\n".join(f"    {line}" for line in text.splitlines()))


def _inline(picture: Picture) -> Markup:
    """The picture as part of an HTML page."""
    if picture.kind == "svg":
        return Markup(picture.data.decode())
    coded = base64.b64encode(picture.data).decode()
    return Markup(f'<img src="data:image/{picture.kind};base64,{coded}" alt="{escape(picture.caption)}">')


def _standalone(svg: bytes) -> bytes:
    """The element as a file that reads well on light and dark pages."""
    names = b'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    style = (
        b"<style>svg{color:#1d2126;background:#fff;font-family:sans-serif}"
        b"@media(prefers-color-scheme:dark){svg{color:#e4e7eb;background:#15181c}}</style>"
    )
    head, _, inside = svg.partition(b">")
    return head.replace(b"<svg", b"<svg " + names, 1) + b">" + style + inside
