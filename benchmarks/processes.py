"""Contenders in processes of their own, seen from the run that times them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Self

from ipa.benchmarks.bytecode import environment
from ipa.benchmarks.pairing import Block, WarmUp, settle
from ipa.engines.errors import IpaError

END_SECONDS = 10
PAUSE = 0.05  # before a block: the threads of whoever ran last stop spinning


class ContenderError(IpaError):
    """A contender could not be opened, or failed."""


@dataclass(frozen=True)
class Entry:
    """Who takes part.

    Attributes:
        name: for the record and the command line.
        title: for people.
        factory: `module:function` that makes the `Contender` in its process.
        options: its keywords, JSON values.
        build_seconds: what its engines took to build, in this run.
    """

    name: str
    title: str
    factory: str
    options: Mapping[str, Any] = field(default_factory=dict)
    build_seconds: float | None = None


class ContenderProcess:
    """A running contender.

    Attributes:
        load_seconds: from the start of the process until it could be asked.
        dtype: that it computes in.
        warm_up: blocks that ran before the measurement.
        first_call_seconds: the first block and the first run of each stage.
        stage_names: what it can be asked for beside the loop.
        device_seconds: of each block so far, by the device's events.
        has_failed: whether it ended, or told an error; it answers no more.
    """

    def __init__(self, entry: Entry) -> None:
        """Start it and wait until it is ready.

        Raises:
            ContenderError: it cannot be opened; the message is its own.
        """
        self.name = entry.name
        self.device_seconds: list[float] = []
        self.warm_up = WarmUp((), False)
        self.first_call_seconds = 0.0
        self.has_failed = False
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  `close` closes it
        spec = json.dumps({"factory": entry.factory, "options": dict(entry.options)})
        start = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ipa.benchmarks.worker", spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=environment(),
            start_new_session=True,  # Ctrl-C is ours to answer
        )
        with ExitStack() as unless_ready:
            unless_ready.callback(self.close)
            self._read()
            self.load_seconds = time.perf_counter() - start
            told = self._ask(do="describe")
            unless_ready.pop_all()
        self.dtype, self.stage_names = str(told["dtype"]), list(told["stages"])

    @property
    def block(self) -> Block:
        """Run the loop's first steps once; the seconds by the host's clock."""

        def run() -> float:
            time.sleep(PAUSE)
            told = self._ask(do="block")
            if told["device_seconds"] is not None:
                self.device_seconds.append(told["device_seconds"])
            return float(told["seconds"])

        return run

    def stage(self, name: str) -> float:
        """Run a stage once; its seconds."""
        return float(self._ask(do="stage", name=name)["seconds"])

    def warm(self) -> None:
        """Run everything once, and the loop until it is settled."""
        first = sum(map(self.stage, self.stage_names))
        self.warm_up = settle(self.block)
        self.first_call_seconds = first + self.warm_up.seconds[0]
        self.device_seconds.clear()

    @property
    def peak_mib(self) -> float:
        """The largest resident set so far."""
        return float(self._ask(do="describe")["peak_mib"])

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            with suppress(BrokenPipeError):  # it died with a question unread, which closing tries to write again
                self._process.stdin.close()
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, **message: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words say why
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):  # nothing, or what it had written when it was killed
            self.has_failed = True
            code = self._process.wait()
            self._stderr.seek(0)
            words = self._stderr.read().decode(errors="replace").strip().splitlines()
            said = words[-1] if words else "it said nothing"
            raise ContenderError(f"the process of {self.name} ended with code {code}: {said}")
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            self.has_failed = True
            raise ContenderError(told["error"])
        return told
