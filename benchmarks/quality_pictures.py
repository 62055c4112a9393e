"""Drawing that can be interrupted: what lies in an arm's folder is not drawn again, and is never mixed with others."""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ipa.benchmarks.quality_data import Item
from ipa.engines.errors import IpaError
from ipa.runtime.request import Request
from ipa.runtime.request_lines import picture_names
from ipa.trainer.files import atomic_path

SETTINGS_FILE, LOG_FILE = "settings.json", "drawn.jsonl"
Draw = Callable[[Request], list[Image.Image]]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """An item and the resolved request that draws its pictures."""

    item: Item
    request: Request

    @property
    def files(self) -> list[str]:
        """Names of its pictures."""
        return picture_names(self.item.id, self.request.num_images)

    @property
    def sha256(self) -> str:
        """Of what this item's pictures depend on beside the settings that all share."""
        content = [self.item.text, self.item.sha256, self.request.prompt, self.request.seed]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class Drawn:
    """An arm's pictures.

    Attributes:
        files: of each item, in the order of the jobs.
        seconds_per_image: the median, over earlier runs too.
    """

    files: list[list[Path]]
    seconds_per_image: float


class ArmFolder:
    """The pictures of one arm on disk, with what they were made with.

    Args:
        folder: is made when missing.
        settings: of all its pictures.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self._settings = folder, dict(settings)

    def check(self, jobs: Sequence[Job]) -> None:
        """Take the folder, or go on with what it has.

        Raises:
            IpaError: it has pictures of other settings or other data.
        """
        file, log = self.folder / SETTINGS_FILE, self._log()
        if not log:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(file) as partial:
                partial.write_text(json.dumps(self._settings, indent=1) + "\n", "utf-8")
        try:
            found = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise IpaError(f"{file} cannot be read ({error}); delete its folder to start over") from error
        now = json.loads(json.dumps(self._settings))  # as a file holds it: lists, no tuples
        if not isinstance(found, dict):
            raise IpaError(f"{file} is not what ipa-bench wrote; choose another --output")
        for name in {**now, **found}:
            if found.get(name) != now.get(name):
                raise self._mixed(f"{name} was {found.get(name)!r} and is {now.get(name)!r}")
        for job in jobs:
            if job.item.id in log and log[job.item.id]["sha256"] != job.sha256:
                raise self._mixed(f"the text, image or seed of {job.item.id} has changed")

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """Those whose pictures are not all there."""
        log = self._log()
        return [
            job
            for job in jobs
            if job.item.id not in log or not all((self.folder / name).exists() for name in job.files)
        ]

    def draw(self, jobs: Sequence[Job], draw: Draw) -> Drawn:
        """Draw what is missing.

        Args:
            jobs: that `check` has seen.
            draw: one request's pictures.
        """
        left = self.missing(jobs)
        before = len(jobs) - len(left)
        for job in tqdm(left, f"draw {self.folder.name}", len(jobs), initial=before, unit="item", disable=None):
            self._draw_one(job, draw)
        log = self._log()
        seconds = statistics.median(log[job.item.id]["seconds"] / len(job.files) for job in jobs)
        return Drawn([[self.folder / name for name in job.files] for job in jobs], seconds)

    def _draw_one(self, job: Job, draw: Draw) -> None:
        start = time.perf_counter()
        images = draw(job.request)
        seconds = time.perf_counter() - start
        for name, image in zip(job.files, images, strict=True):
            with atomic_path(self.folder / name) as partial:
                image.save(partial, "PNG")
        line = {"id": job.item.id, "sha256": job.sha256, "seconds": round(seconds, 4)}
        with (self.folder / LOG_FILE).open("a", encoding="utf-8") as log:  # after the pictures: it says they are whole
            log.write("\n" + json.dumps(line))  # the line break first ends what a kill may have cut short

    def _log(self) -> dict[str, dict[str, Any]]:
        """What was drawn, by item; a line that a kill cut short does not count."""
        file = self.folder / LOG_FILE
        found = {}
        for text in file.read_text("utf-8").splitlines() if file.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            found[line["id"]] = line
        return found

    def _mixed(self, what: str) -> IpaError:
        return IpaError(
            f"{self.folder} has pictures of another run: {what}; choose another --output, or start over with --force"
        )


def remove_arms(folders: Iterable[Path], names: Iterable[str]) -> None:
    """Delete those folders that `ArmFolder` made: their settings have these names."""
    for folder in folders:
        try:
            settings = json.loads((folder / SETTINGS_FILE).read_text("utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(settings, dict) and settings.keys() >= set(names):
            shutil.rmtree(folder)
