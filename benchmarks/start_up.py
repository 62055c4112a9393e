"""What a process costs before its first picture: time and memory of the import, and size of the installation."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ipa.benchmarks.bytecode import environment
from ipa.benchmarks.records import StartUp
from ipa.runtime.demo import FOLDER

RUNS = 11
SLOW = 1.0  # seconds; fewer runs then
# Name, code, distributions that are installed for it.
OURS = (
    "ipa-runtime[onnxruntime]",
    "from ipa.runtime import Pipeline, Request; import onnxruntime",
    ("numpy", "pillow", "tokenizers", "click", "tqdm", "safetensors", "onnxruntime"),
)
THEIRS = (
    "torch + diffusers",
    "from diffusers import StableDiffusionPipeline",
    ("torch", "diffusers", "transformers", "accelerate", "safetensors"),
)
RSS = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmRSS')))"


def start_ups() -> list[StartUp]:
    """Ours, and PyTorch with diffusers if they are installed."""
    own = sum(path.stat().st_size for path in FOLDER.parent.rglob("*") if path.is_file() and path.suffix != ".pyc")
    rows = [start_up(*OURS, own)]
    if "torch" in closure(("torch",)):
        rows.append(start_up(*THEIRS))
    return rows


def start_up(name: str, code: str, roots: tuple[str, ...], more_bytes: int = 0) -> StartUp:
    """Measure an import in new interpreters; what the interpreter itself takes is left out of the time.

    Args:
        code: that imports.
        roots: distributions that it needs.
        more_bytes: on disk, beside those.
    """
    seconds(code)  # fills the caches
    runs = 3 if seconds(code) > SLOW else RUNS
    times = [seconds(code) - seconds("pass") for _ in range(runs)]
    command = [sys.executable, "-c", f"{code}\n{RSS}"]
    rss = subprocess.run(command, capture_output=True, text=True, check=True, env=environment()).stdout
    size = more_bytes + sum(map(installed_bytes, closure(roots)))
    return StartUp(name, statistics.median(times), int(rss.split()[-1]) / 2**10, size / 1e6)


def closure(roots: tuple[str, ...]) -> set[str]:
    """Names of installed distributions that the roots need here, themselves included; extras are left out.

    Names are normalised: `huggingface_hub` is `huggingface-hub`.
    """
    found: set[str] = set()
    waiting = list(map(canonicalize_name, roots))
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            requires = distribution(name).requires or ()
        except PackageNotFoundError:  # a root that is not installed
            continue
        found.add(name)
        for requirement in map(Requirement, requires):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(requirement.name))
    return found


def installed_bytes(name: str) -> int:
    """Size of a distribution's files on disk, bytecode caches left out."""
    files = distribution(name).files or ()
    paths = [Path(str(file.locate())) for file in files if file.suffix != ".pyc"]
    return sum(path.stat().st_size for path in paths if path.is_file())


def seconds(code: str) -> float:
    """Wall-clock time of a new interpreter that runs `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL, env=environment())
    return time.perf_counter() - start


def main() -> None:
    """Print a line for each: `python -m ipa.benchmarks.start_up`."""
    for row in start_ups():
        memory = f"{row.rss_mib:.0f} MiB; {row.installed_mb:.0f} MB on disk"
        print(f"{row.name}: import {row.import_seconds:.2f} s, {memory}")


if __name__ == "__main__":
    main()
