"""Ctrl-C without loss: a signal is noted, and acted on between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class TrainStoppedError(Exception):
    """Training was stopped by a signal after saving a checkpoint; the message says how to go on.

    Attributes:
        signum: which signal.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


@dataclass
class StopRequest:
    """The signal that asked training to stop; 0 while none did."""

    signum: int = 0


@contextmanager
def noted_signals() -> Iterator[StopRequest]:
    """Note SIGINT and SIGTERM instead of dying of them. A second one acts as it always does.

    Outside of the main thread signals cannot be caught, and nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in signals}

    def note(signum: int, _frame: FrameType | None) -> None:
        request.signum = signum
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in signals:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
