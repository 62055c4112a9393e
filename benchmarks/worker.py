"""The process of one contender: told by lines of JSON what to run, it answers with seconds.

Each contender has its own process, so that no thread pool, allocator or cache of one is in another's way, and so that
memory can be told apart. It is started by `ipa.benchmarks.processes`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from ipa.benchmarks.contender import Contender


def open_contender(factory: str, options: dict[str, Any]) -> Contender:
    """Call `module:function` with options."""
    module, _, function = factory.partition(":")
    contender: Contender = getattr(import_module(module), function)(**options)
    return contender


def peak_mib() -> float:
    """The largest resident set of this process so far, weights mapped from files included."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


def answer(contender: Contender, asked: dict[str, Any]) -> dict[str, Any]:
    """Do what a line asks for."""
    match asked["do"]:
        case "block":
            seconds, device_seconds = contender.block()
            return {"seconds": seconds, "device_seconds": device_seconds}
        case "stage":
            start = time.perf_counter()
            contender.stages[asked["name"]]()
            return {"seconds": time.perf_counter() - start}
        case _:
            return {"dtype": contender.dtype, "stages": list(contender.stages), "peak_mib": peak_mib()}


def serve(spec: dict[str, Any], answers: TextIO) -> None:
    """Open the contender, then answer line after line until there are no more; an error is the last answer."""

    def tell(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        contender = open_contender(spec["factory"], spec["options"])
        tell({"ready": True})
        for line in sys.stdin:
            tell(answer(contender, json.loads(line)))
    except Exception as error:  # whatever it is, the run goes on without this contender
        tell({"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    """Serve the contender that the first argument describes; what libraries print does not mix with the answers."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        serve(json.loads(sys.argv[1]), answers)


if __name__ == "__main__":
    main()
