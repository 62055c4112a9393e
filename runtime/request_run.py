"""`ipa-run --requests`: many requests, each finished one on record, so that a second run does the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipa.engines.errors import IpaError, RequestError
from ipa.engines.registry import backend_named
from ipa.runtime.output import check_writable, is_folder
from ipa.runtime.pipeline import Pipeline, Result
from ipa.runtime.record import origin, write_pictures
from ipa.runtime.request import Request
from ipa.runtime.request_lines import RequestLine, picture_names
from ipa.runtime.request_record import request_record

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
    newest such line for its id says that the same request was done, its pictures are still there, and every model and
    file that it is made with is the one it was. The engine may be another: what differs then is rounding.
    """

    def __init__(self, lines: Sequence[RequestLine], output: Path, bundle: Path | None) -> None:
        """Read what is done already.

        Args:
            bundle: as the user named it, for the pictures' record.

        Raises:
            RequestError: the output is no folder, cannot be made or written to, or its record cannot be read.
        """
        self.lines, self.output, self._bundle = lines, output, bundle
        self.summary = Summary()
        if not is_folder(output):
            raise RequestError(f"--output {output}: is a picture, and --requests makes many: name a folder")
        try:
            output.mkdir(exist_ok=True)
            self._finished = _finished(output / RESULTS_FILE)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise RequestError(f"--output {output}: must be a folder that can be written to ({reason})") from error
        check_writable(output)

    def run(
        self,
        pipeline: Pipeline,
        batch: int,
        *,
        has_metadata: bool,
        report: Report,
        check: Callable[[], None] = lambda: None,
    ) -> Summary:
        """Carry out what is not done. What one request meets, an engine's refusal included, does not stop the others.

        Args:
            batch: most pictures in one call of the UNet; requests are put together only if they can share it.
            has_metadata: whether the pictures carry their request.
            report: called for each line: with its result, why there is none, or neither if it was done before.
            check: called after each step; raises to stop.
        Raises:
            EngineError: an engine that every request needs cannot be opened.
            RequestError: the record cannot be written, so that nothing would count as done.
        """
        for lines in self._batches(pipeline, batch, report):
            for group in self._carried_out(lines, pipeline, check, report):
                for line, result in group:
                    try:
                        record = self._written(line, result, pipeline, has_metadata)
                    except RequestError as error:  # a folder of the picture's name, a full disk
                        self._fail(line, str(error), report)
                        continue
                    self._append(json.dumps(record))
                    self.summary.done += 1
                    report(line, result, "")
        return self.summary

    def _carried_out(
        self, lines: list[RequestLine], pipeline: Pipeline, check: Callable[[], None], report: Report
    ) -> Iterator[list[tuple[RequestLine, Result]]]:
        """The results of a batch, together; one by one where a request spoils it."""
        if pipeline.keep_engines:
            pipeline.load()  # what cannot be opened here would meet every other request, too
        try:
            results = pipeline.run_batch([_request(line) for line in lines], lambda step: check())
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
            if self._is_finished(line, pipeline):
                self.summary.skipped += 1
                report(line, None, "")
                continue
            try:
                key = pipeline.batch_key(line.request)
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

    def _is_finished(self, line: RequestLine, pipeline: Pipeline) -> bool:
        record = self._finished.get(line.id)
        if record is None or record.get("request") != _asked(line):
            return False
        if not all((self.output / str(name)).is_file() for name in record.get("images", [])):
            return False
        try:
            now = origin(pipeline, _request(line), self._bundle)
        except IpaError:
            return False  # when it is carried out, it says why
        return all(record.get(name) == now[name] for name in ("models", "files"))

    def _written(self, line: RequestLine, result: Result, pipeline: Pipeline, has_metadata: bool) -> dict[str, Any]:
        """Write the pictures; what to keep on record of them."""
        names = picture_names(line.id, len(result.images))
        about = origin(pipeline, result.request, self._bundle)
        write_pictures(result, [self.output / name for name in names], about if has_metadata else None)
        return {
            "id": line.id,
            "images": names,
            "request": _asked(line),
            "seed": result.request.seed,
            "warnings": result.warnings,
            "seconds": result.seconds,
            **about,
        }

    def _append(self, line: str) -> None:
        path = self.output / RESULTS_FILE
        try:
            _append(path, line)
        except OSError as error:
            raise RequestError(f"{path}: cannot be written ({error.strerror}); nothing would count as done") from error

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
