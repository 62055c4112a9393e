"""What a training run tells: a bar on a terminal, lines elsewhere, and a log file."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from ipa.trainer.files import atomic_path

LINES_PER_RUN = 50  # without a terminal
SECONDS_PER_LINE = 30.0


class Progress:
    """Progress of one process on stderr; only the main process shows any.

    Args:
        is_main: whether this is the process that shows it.
        stream: where to; stderr.
    """

    def __init__(self, is_main: bool, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._is_main = is_main
        self._has_terminal = is_main and self._stream.isatty()
        self._bar: Any = None
        self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_bar()

    def message(self, text: str) -> None:
        """One line, from any process, without tearing the bar."""
        tqdm.write(text, file=self._stream)

    def main_message(self, text: str) -> None:
        """One line, from the main process alone."""
        if self._is_main:
            self.message(text)

    def update(self, title: str, done: int, total: int, detail: str = "") -> None:
        """Show that ``done`` of ``total`` is reached; a new title starts a new bar."""
        if self._has_terminal:
            if self._bar is None or self._bar.desc != f"{title}: ":
                self._close_bar()
                self._bar = tqdm(total=total, initial=done, desc=title, file=self._stream)
            self._bar.set_postfix_str(detail, refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._is_main and self._is_due(done, total):
            self._last_line = time.monotonic()
            self._stream.write(f"{title} {done}/{total}{', ' if detail else ''}{detail}\n")
            self._stream.flush()

    def _is_due(self, done: int, total: int) -> bool:
        is_round = done % max(1, total // LINES_PER_RUN) == 0
        return done == total or (is_round and time.monotonic() - self._last_line > SECONDS_PER_LINE)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class TrainLog:
    """``train_log.jsonl``: step, loss (mean since the last line), lr, rate (steps per second).

    Args:
        path: the file.
        first_step: steps already done; lines after it, of a run that was killed, are dropped.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        kept = [line for line in _complete_lines(path) if line["step"] <= first_step]
        with atomic_path(path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._losses: list[float] = []
        self._window_start = time.monotonic()

    def add(self, loss: float) -> None:
        """Note the loss of one optimizer step."""
        self._losses.append(loss)

    def write(self, step: int, lr: float) -> dict[str, float]:
        """Write a line on the steps since the last one, and return it."""
        now = time.monotonic()
        line = {
            "step": step,
            "loss": sum(self._losses) / len(self._losses),
            "lr": lr,
            "rate": round(len(self._losses) / max(now - self._window_start, 1e-9), 3),
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._losses, self._window_start = [], now
        return line

    def losses(self) -> list[float]:
        """The losses of all lines."""
        return [line["loss"] for line in _complete_lines(self._path)]


def _complete_lines(path: Path) -> list[dict[str, float]]:
    """The lines of a log; one that a kill cut short ends it."""
    lines: list[dict[str, float]] = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
                lines.append({"step": line["step"], **line})
            except (ValueError, KeyError, TypeError):
                break
    return lines
