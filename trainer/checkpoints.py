"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder ``step-00000100``. It is written under a temporary name; ``COMPLETE.json`` (every file's size
and sha256) goes in last, everything is synced, the folder is renamed, and only then are the oldest removed.
This module knows nothing of what is inside: the caller writes the files and reads them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ipa.trainer.errors import TrainError
from ipa.trainer.files import sync_file, sync_folder

COMPLETE = "COMPLETE.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})")


def save_checkpoint(root: Path, step: int, write: Callable[[Path], None], keep: int) -> Path:
    """Write one checkpoint whole, then delete all but the newest ``keep``.

    Args:
        root: folder of all checkpoints; made when missing.
        step: optimizer steps done.
        write: writes the content (flat files) into the folder it is given.
        keep: at least 2, so that a damaged newest one is no loss.
    Raises:
        TrainError: the disk is full or failed; earlier checkpoints are untouched.
    """
    target, partial, replaced = _folder(root, step), root / f".step-{step:08d}.partial", root / f".step-{step:08d}.old"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        partial.mkdir()
        write(partial)
        _seal(partial, step)
        if target.exists():  # a damaged one: a run never saves a step twice
            target.rename(replaced)
        partial.rename(target)
        sync_folder(root)
        for old in _steps(root)[keep:]:
            shutil.rmtree(_folder(root, old))
        _remove_leftovers(root)
    except OSError as error:
        needed = sum(file.stat().st_size for file in partial.iterdir()) if partial.is_dir() else 0
        shutil.rmtree(partial, ignore_errors=True)
        raise TrainError(_failure(root, step, error, needed)) from error
    return target


def newest_checkpoint(root: Path, report: Callable[[str], None]) -> tuple[int, Path] | None:
    """Step and folder of the newest checkpoint that is complete and undamaged; None when there is none.

    Args:
        root: folder of all checkpoints; may be missing.
        report: told of every newer one that had to be passed over, and why.
    """
    for step in _steps(root):
        folder = _folder(root, step)
        damage = _damage(folder)
        if damage is None:
            return step, folder
        report(f"checkpoint {folder} is skipped: {damage}")
    return None


def set_aside(root: Path) -> Path | None:
    """Move all checkpoints out of the way for a fresh start; returns where they are now."""
    if not _steps(root):
        return None
    number = 1
    while (aside := root.with_name(f"{root.name}.{number}")).exists():
        number += 1
    root.rename(aside)
    return aside


def _folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def _steps(root: Path) -> list[int]:
    """Steps of all checkpoint folders, newest first."""
    if not root.is_dir():
        return []
    matches = (STEP_FOLDER.fullmatch(entry.name) for entry in root.iterdir() if entry.is_dir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def _remove_leftovers(root: Path) -> None:
    """Remove what a killed save left behind; nothing ever reads these names."""
    for entry in root.glob(".step-*"):
        shutil.rmtree(entry)


def _seal(folder: Path, step: int) -> None:
    """Sync all files and write the record that makes the checkpoint complete."""
    files = {}
    for file in sorted(folder.iterdir()):
        sync_file(file)
        files[file.name] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    record = folder / COMPLETE
    record.write_text(json.dumps({"step": step, "files": files}, indent=2), encoding="utf-8")
    sync_file(record)
    sync_folder(folder)


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None when nothing is."""
    try:
        files = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            file = folder / name
            if file.stat().st_size != expected["size"]:
                return f"{name} has {file.stat().st_size} bytes, expected {expected['size']}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} was changed or damaged (sha256 differs)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{COMPLETE} or a file it lists cannot be read"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _failure(root: Path, step: int, error: OSError, written: int) -> str:
    try:
        free = f"{shutil.disk_usage(root).free / 1e6:.0f} MB are free there"
    except OSError:
        free = "the folder cannot be reached"
    steps = _steps(root)
    earlier = f"the checkpoint of step {steps[0]} is untouched" if steps else "there is no earlier checkpoint"
    return (
        f"the checkpoint of step {step} could not be saved in {root}: {error.strerror or error} "
        f"(after {written / 1e6:.1f} MB; {free}); {earlier}; make room and run the same command again"
    )
