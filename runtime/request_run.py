"""`ipa-run --requests`: many requests, each finished one on record, so that a second run does the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipa.engines.errors import EngineError, IpaError, RequestError
from ipa.engines.registry import backend_named
from ipa.runtime.pipeline import Pipeline, Result
from ipa.runtime.record import origin, request_record, write_pictures
from ipa.runtime.request import Request
from ipa.runtime.request_lines import RequestLine

Report = Callable[[RequestLine, Result | None, str], None]
RESULTS_FILE = "results.jsonl"
_GPU_BATCH = 4  # the largest that `ipa-export build-engines` builds for by default


@dataclass
class Summary:
    """How a run of many requests ended."""

    done: int = 0
    skipped: int = 0
    failed: int = 0

    def __str__(self) -> str:
        return f"{self.done} done, {self.skipped} done before, {self.failed} failed"


def usual_batch(pipeline: Pipeline) -> int:
    """Pictures in one call of the UNet. A CPU is as fast with one and needs less memory; a GPU is not full with one."""
    return _GPU_BATCH if backend_named(pipeline.engine).needs_gpu else 1


class RequestRun:
    """A file of requests, carried out into a folder.

    `results.jsonl` there gets one line for each request that is finished, in one write. A request is skipped when the
    newest such line for its id says that the same request was done and its pictures are still there.
    """

    def __init__(self, lines: Sequence[RequestLine], output: Path, bundle: Path | None) -> None:
        """Read what is done already.

        Args:
            bundle: as the user named it, for the pictures' record.

        Raises:
            RequestError: the folder cannot be made, or its record cannot be read.
        """
        self.lines, self.output, self._bundle = lines, output, bundle
        self.summary = Summary()
        try:
            output.mkdir(exist_ok=True)
            self._finished = _finished(output / RESULTS_FILE)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise RequestError(f"--output {output}: must be a folder that can be written to ({reason})") from error

    def run(
        self,
        pipeline: Pipeline,
        batch: int,
        *,
        has_metadata: bool,
        report: Report,
        check: Callable[[], None] = lambda: None,
    ) -> Summary:
        """Carry out what is not done.

        Args:
            batch: most pictures in one call of the UNet; requests are put together only if they can share it.
            has_metadata: whether the pictures carry their request.
            report: called for each line: with its result, why there is none, or neither if it was done before.
            check: called after each step; raises to stop.
        """
        for lines in self._batches(pipeline, batch, report):
            for group in self._carried_out(lines, pipeline, check, report):
                for line, result in group:
                    self._keep(line, result, pipeline, has_metadata)
                    report(line, result, "")
        return self.summary

    def _carried_out(
        self, lines: list[RequestLine], pipeline: Pipeline, check: Callable[[], None], report: Report
    ) -> Iterator[list[tuple[RequestLine, Result]]]:
        """The results of a batch, together; one by one where a request spoils it."""
        try:
            results = pipeline.run_batch([_request(line) for line in lines], lambda step: check())
        except EngineError:
            raise  # it would meet every other request, too
        except IpaError as error:
            if len(lines) == 1:
                self._fail(lines[0], str(error), report)
            else:
                for line in lines:
                    yield from self._carried_out([line], pipeline, check, report)
            return
        yield list(zip(lines, results, strict=True))

    def _batches(self, pipeline: Pipeline, batch: int, report: Report) -> Iterator[list[RequestLine]]:
        """Neighbours that can share a call of the UNet, at most `batch` pictures together."""
        group: list[RequestLine] = []
        group_key: object = None
        for line in self.lines:
            if line.request is None:
                self._fail(line, line.problem, report)
                continue
            if self._is_finished(line):
                self.summary.skipped += 1
                report(line, None, "")
                continue
            try:
                key = pipeline.batch_key(line.request)
            except EngineError:
                raise
            except IpaError as error:
                self._fail(line, str(error), report)
                continue
            pictures = sum(_request(one).num_images for one in group) + line.request.num_images
            if group and (key != group_key or pictures > batch):
                yield group
                group = []
            group, group_key = [*group, line], key
        if group:
            yield group

    def _is_finished(self, line: RequestLine) -> bool:
        record = self._finished.get(line.id)
        if record is None or record.get("request") != _asked(line):
            return False
        return all((self.output / str(name)).is_file() for name in record.get("images", []))

    def _keep(self, line: RequestLine, result: Result, pipeline: Pipeline, has_metadata: bool) -> None:
        """Write the pictures, then the line that says so."""
        names = (
            [f"{line.id}.png"] if len(result.images) == 1 else [f"{line.id}-{i}.png" for i in range(len(result.images))]
        )
        about = origin(pipeline, result.request, self._bundle)
        write_pictures(result, [self.output / name for name in names], about if has_metadata else None)
        record = {
            "id": line.id,
            "images": names,
            "request": _asked(line),
            "seed": result.request.seed,
            "warnings": result.warnings,
            "seconds": result.seconds,
            "engine": pipeline.engine,
        }
        _append(self.output / RESULTS_FILE, json.dumps(record))
        self.summary.done += 1

    def _fail(self, line: RequestLine, why: str, report: Report) -> None:
        self.summary.failed += 1
        report(line, None, why)


def _request(line: RequestLine) -> Request:
    assert line.request is not None
    return line.request


def _asked(line: RequestLine) -> dict[str, Any]:
    """The request as it was asked for, as JSON gives it back."""
    asked: dict[str, Any] = json.loads(json.dumps(request_record(_request(line))))
    return asked


def _finished(path: Path) -> dict[str, Mapping[str, Any]]:
    """The newest record of each id. A last line that was cut off by a crash is passed over."""
    found: dict[str, Mapping[str, Any]] = {}
    if not path.exists():
        return found
    for text in path.read_text("utf-8", "replace").split("\n"):
        try:
            record = json.loads(text)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("id"), str) and isinstance(record.get("images"), list):
            found[record["id"]] = record
    return found


def _append(path: Path, line: str) -> None:
    """Add a line with one write, on a line of its own even after one that was cut off."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        starts_line = size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"
        os.write(descriptor, f"{'' if starts_line else chr(10)}{line}\n".encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
