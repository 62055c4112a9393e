"""Where pictures go, and how they get there: whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ipa.engines.errors import RequestError

# Formats that people name and we do not write: PNG alone keeps every pixel and carries the request as text.
_OTHER_FORMATS = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jxl", ".heic"}


def check_writable(output: Path) -> None:
    """Prove that `output` can be written, before the expensive work: a file is made beside it and removed.

    Raises:
        RequestError: another format than PNG, a file where a folder is meant, a missing parent folder, or a
            folder that cannot be written to.
    """
    _check_folder(output, output if is_folder(output) and output.exists() else output.parent)


def check_file_writable(path: Path) -> None:
    """The same for a file that is no picture.

    Raises:
        RequestError: it is a folder, its folder is missing or cannot be written to.
    """
    try:
        if path.is_dir():
            raise RequestError(f"output {path}: is a folder; name a file in it")
    except OSError as error:
        raise RequestError(f"output {path}: {error.strerror}") from error
    _check_folder(path, path.parent)


def _check_folder(output: Path, folder: Path) -> None:
    if not folder.is_dir():
        raise RequestError(f"output {output}: there is no folder {folder}; make it first")
    probe = _temporary(folder)
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise RequestError(f"output {output}: cannot write to folder {folder} ({error.strerror})") from error


def output_paths(output: Path, n: int, seed: int) -> list[Path]:
    """The files for `n` pictures.

    `x.png` is that file for one picture, and `x-0.png`, `x-1.png`, ... for several; files of these names are
    replaced. Anything else is a folder, which is made when missing: its files are `SEED-0.png`,
    `SEED-1.png`, ..., past the numbers that are taken, so nothing there is ever replaced.

    Raises:
        RequestError: another format than PNG, a file where a folder is meant, or the folder cannot be made.
    """
    if not is_folder(output):
        return [output] if n == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(n)]
    try:
        output.mkdir(exist_ok=True)
    except OSError as error:
        raise RequestError(f"output {output}: the folder cannot be made ({error.strerror})") from error
    first = 0
    while any((output / f"{seed}-{i}.png").exists() for i in range(first, first + n)):
        first += 1
    return [output / f"{seed}-{i}.png" for i in range(first, first + n)]


def write_png(image: Image.Image, path: Path, pnginfo: PngInfo | None) -> None:
    """Write one picture; on failure nothing new is left and an older file is untouched.

    Args:
        image: the picture.
        path: the file; it is replaced if it exists.
        pnginfo: text to store with it.

    Raises:
        RequestError: `path` is a folder, its folder is missing or cannot be written to, or the disk is full.
    """
    _write(path, lambda file: image.save(file, format="PNG", pnginfo=pnginfo))


def write_bytes(content: bytes, path: Path) -> None:
    """Write a file; as `write_png`."""
    _write(path, lambda file: file.write(content))


def _write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    temporary = _temporary(path.parent)
    try:
        if path.is_dir():
            raise RequestError(f"output {path}: is a folder; name a file in it")
        with temporary.open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise RequestError(f"output {path}: cannot be written ({error.strerror})") from error
    finally:
        # Ctrl-C lands here too. After a successful replace there is nothing left to remove.
        with suppress(OSError):
            temporary.unlink()


def _temporary(folder: Path) -> Path:
    # Not `tempfile`: its files are readable by their owner alone, and would stay so after the rename.
    return folder / f".{secrets.token_hex(8)}.tmp"


def is_folder(output: Path) -> bool:
    """Whether `output` names a folder: one that exists, or a new name that is not a picture's.

    Raises:
        RequestError: another format than PNG, or a file where a folder is meant.
    """
    try:
        if output.is_dir():
            return True
    except OSError as error:  # a name that is too long, a folder on the way that may not be entered
        raise RequestError(f"output {output}: {error.strerror}") from error
    suffix = output.suffix.lower()
    if suffix == ".png":
        return False
    if suffix in _OTHER_FORMATS:
        raise RequestError(f"output {output}: pictures are written as PNG; name it {output.with_suffix('.png').name}")
    if output.exists():
        raise RequestError(f"output {output}: exists and is not a folder; name a folder or a .png file")
    return True
