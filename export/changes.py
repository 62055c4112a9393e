"""What is changed in a base model before it is exported, as a user asks for it and as a bundle records it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ipa.engines.bundle import hash_file
from ipa.engines.errors import IpaError
from ipa.engines.manifest import LoraRecord, Manifest, TextualInversionRecord
from ipa.export.lora import LoraFile
from ipa.export.named_files import valued
from ipa.export.textual_inversion import TextualInversionFile

Record = TypeVar("Record", LoraRecord, TextualInversionRecord)
File = TypeVar("File", LoraFile, TextualInversionFile)


@dataclass(frozen=True)
class BaseChanges:
    """What differs from the pipeline that `--base` names.

    Attributes:
        config: folder of configurations and tokenizer for a checkpoint that is a single file; `None`: those
            of Stable Diffusion 1.5 or XL 1.0.
        vae: folder, Hub id or file of another VAE.
        loras: added into UNet and text encoders.
        textual_inversions: new words.
        clip_skip: layers of the text encoders to leave out, from the last.
    """

    config: Path | None = None
    vae: str | None = None
    loras: tuple[LoraFile, ...] = ()
    textual_inversions: tuple[TextualInversionFile, ...] = ()
    clip_skip: int = 0

    @property
    def paths(self) -> tuple[Path, ...]:
        """Everything that is read."""
        named = (self.config, Path(self.vae) if self.vae else None)
        files = [*(lora.path for lora in self.loras), *(word.path for word in self.textual_inversions)]
        return (*(path for path in named if path), *files)


def parse_lora(text: str) -> LoraFile:
    """`FILE[=SCALE]`.

    Raises:
        IpaError: the scale is no finite number.
    """
    path, scale = valued(text, is_last=True)
    if scale is None:
        return LoraFile(path)
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise IpaError(f"lora {text}: {scale!r} is no finite number, expected FILE=SCALE such as {path}=0.8")
    return LoraFile(path, number)


def parse_textual_inversion(text: str) -> TextualInversionFile:
    """`FILE[=WORD]`."""
    return TextualInversionFile(*valued(text, is_last=False))


def repeated(manifest: Manifest, given: BaseChanges) -> BaseChanges:
    """The changes that a bundle was made with, from the files that are named again.

    Args:
        given: the files, in any order; what is left open (scales, words) comes from the bundle.
    Raises:
        IpaError: a file is missing, or is not one that the bundle was made with.
    """
    loras = _matched(manifest.loras, given.loras, "--lora", "scale", lambda file: file.scale)
    inversions = _matched(
        manifest.textual_inversions, given.textual_inversions, "--textual-inversion", "token", lambda file: file.token
    )
    return replace(
        given,
        loras=tuple(replace(file, scale=record.scale) for record, file in loras),
        textual_inversions=tuple(replace(file, token=record.token) for record, file in inversions),
        clip_skip=manifest.clip_skip,
    )


def check_source(manifest: Manifest, part: str, option: str, given: str | None) -> None:
    """Refuse another checkpoint or VAE than the bundle was made of.

    Args:
        part: key of the manifest's `sources`.
        given: folder, Hub id or file; `None`: not given.
    Raises:
        IpaError: it differs.
    """
    record = manifest.sources.get(part)
    if record is None and given is not None:
        raise IpaError(f"the bundle was made without {option}; leave {option} {given} out")
    if record is not None and given is None:
        raise IpaError(f"the bundle was made with {option} {record.name}; name it again")
    if record is not None and given is not None and Path(given).is_file():
        found = hash_file(Path(given))
        if found != record.sha256:
            wanted = f"sha256 {record.sha256[:16]}..." if record.sha256 else "a folder"
            raise IpaError(
                f"the bundle was made with {option} {record.name} ({wanted}), {given} has sha256 {found[:16]}..."
            )


def _matched(
    records: Sequence[Record],
    files: Sequence[File],
    option: str,
    name: str,
    value: Callable[[File], float | str | None],
) -> list[tuple[Record, File]]:
    """Each record with its file, found by content."""
    left = [(file, _hash(file.path, option)) for file in files]
    found = []
    for record in records:
        match = next((item for item in left if item[1] == record.sha256), None)
        if match is None:
            raise IpaError(
                f"the bundle was made with {option} {record.name} (sha256 {record.sha256[:16]}...); name it again"
            )
        left.remove(match)
        given, wanted = value(match[0]), getattr(record, name)
        if given is not None and given != wanted:
            raise IpaError(f"the bundle was made with {option} {record.name}={wanted}, not {given}")
        found.append((record, match[0]))
    if left:
        raise IpaError(f"{left[0][0].path} is not in the bundle; leave {option} {left[0][0].path} out")
    return found


def _hash(path: Path, option: str) -> str:
    if not path.is_file():
        raise IpaError(f"{option} {path}: no such file")
    return hash_file(path)
