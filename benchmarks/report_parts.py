"""What a report is made of; both pages are written from these parts, so they cannot differ in what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Literal

from ipa.benchmarks.records import NotMeasured, Origin


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        columns: headings, with the unit of the column.
        rows: as many cells each as there are columns; the first names the row.
        words: columns that hold words, besides the first; the others hold figures.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[str, ...] = ()

    @property
    def is_prose(self) -> bool:
        """Whether no column holds figures."""
        return set(self.columns[1:]) <= set(self.words)


@dataclass(frozen=True)
class Picture:
    """A plot or a contact sheet.

    Attributes:
        name: file name without its suffix, unique in a report.
        caption: says what is seen, to people who see it and to those who do not.
        kind: `svg`, `png`, `jpeg` or `webp`: the file's suffix.
        data: the file's content; of a plot the `<svg>` element in UTF-8.
    """

    name: str
    caption: str
    kind: str
    data: bytes


@dataclass(frozen=True)
class Section:
    """All of one record.

    Attributes:
        anchor: unique in a report, of letters, digits and hyphens.
        lead: the setting in one line.
        headlines: what the figures say, in sentences.
        warnings: why not to believe some of it.
        remarks: checks that passed, and how figures were joined.
        command: measures it again.
        facts: how and where it was measured.
    """

    kind: Literal["speed", "quality"]
    anchor: str
    title: str
    lead: str
    headlines: tuple[str, ...]
    warnings: tuple[str, ...]
    remarks: tuple[str, ...]
    plots: tuple[Picture, ...]
    sheets: tuple[Picture, ...]
    tables: tuple[Table, ...]
    command: str
    facts: Table


@dataclass(frozen=True)
class Term:
    """A word of the report and its meaning."""

    name: str
    meaning: str


def not_measured(missing: list[NotMeasured]) -> list[Table]:
    """The rows that a run did without, and why; no table if there are none."""
    rows = tuple((row.name, row.reason) for row in missing)
    return [Table("Not measured", ("What", "Why"), rows, ("Why",))] if rows else []


def facts(file: str, setting: dict[str, object], labels: dict[str, str], origin: Origin) -> Table:
    """Setting, machine, versions and date of a record.

    Args:
        file: name of the record.
        labels: of the setting's keys; a key without one is shown as it is.
    """
    rows = [("record", file)]
    rows += [
        (labels.get(key, key.replace("_", " ")), words(value))
        for key, value in setting.items()
        if value not in (None, "", [], {})
    ]
    machine = origin.machine
    described = [
        machine.get("cpu"),
        f"cores: {machine['cores']}" if "cores" in machine else None,
        f"{machine['memory_gib']} GiB of memory" if "memory_gib" in machine else None,
        f"GPU: {machine['gpu'] or 'none'}" if "gpu" in machine else None,
        machine.get("system"),
    ]
    rows.append(("machine", "; ".join(str(part) for part in described if part)))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in origin.versions.items())))
    rows.append(("measured", origin.created))
    return Table("How and where", ("What", "Value"), tuple(rows), ("Value",))


def lead(setting: dict[str, object], phrases: Sequence[str]) -> str:
    """The phrases whose `{key}`s are all in the setting, filled in."""
    known = {key: words(value) for key, value in setting.items() if value is not None}
    keys = [{key for _, key, _, _ in Formatter().parse(phrase) if key} for phrase in phrases]
    text = "; ".join(
        phrase.format_map(known) for phrase, all_of in zip(phrases, keys, strict=True) if all_of <= set(known)
    )
    return text[:1].upper() + text[1:]


def words(value: object) -> str:
    """A setting's value for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {words(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
