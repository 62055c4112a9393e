"""What the runtime costs before the first step: size of the installation, time and memory of the import.

python -m ipa.benchmarks.footprint
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from importlib.metadata import distribution, version
from pathlib import Path

import click

from ipa.runtime.demo import FOLDER

RUNS = 11
ROOTS = ("numpy", "pillow", "tokenizers", "click", "tqdm", "onnxruntime")  # of `ipa-runtime[onnxruntime]`
IMPORT = "from ipa.runtime import Pipeline, Request"
RSS = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmRSS')))"


def closure(roots: tuple[str, ...]) -> set[str]:
    """Names of distributions that the roots need, themselves included; extras are left out."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for requirement in distribution(name).requires or ():
            needed, _, marker = requirement.partition(";")
            if not re.search(r"extra|platform_system|sys_platform|python_version *<", marker):
                waiting.append(re.split(r"[^\w.\-]", needed.strip(), maxsplit=1)[0].lower())
    return found


def installed_bytes(name: str) -> int:
    """Size of a distribution's files on disk, bytecode caches left out."""
    files = distribution(name).files or ()
    paths = [Path(str(file.locate())) for file in files if file.suffix != ".pyc"]
    return sum(path.stat().st_size for path in paths if path.is_file())


def seconds(code: str) -> float:
    """Wall-clock time of a new interpreter that runs `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("out"), help="Folder for footprint.json.")
def main(output: Path) -> None:
    """Measure and print; the record goes to OUTPUT."""
    seconds(IMPORT)  # fills the bytecode and file caches
    pairs = [(seconds(IMPORT), seconds("pass")) for _ in range(RUNS)]
    rss = subprocess.run([sys.executable, "-c", f"{IMPORT}\n{RSS}"], capture_output=True, text=True, check=True).stdout
    sizes = {name: installed_bytes(name) for name in sorted(closure(ROOTS))}
    own = sum(path.stat().st_size for path in FOLDER.parent.rglob("*") if path.is_file() and path.suffix != ".pyc")
    record = {
        "command": "python -m ipa.benchmarks.footprint",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ROOTS},
        "interpreter_with_import_seconds": statistics.median(first for first, _ in pairs),
        "import_seconds": statistics.median(first - second for first, second in pairs),
        "rss_mib": int(rss) / 1024,
        "installed_mb": (sum(sizes.values()) + own) / 1e6,
        "largest_mb": {name: size / 1e6 for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:6]},
    }
    text = json.dumps(record, indent=1)
    output.mkdir(parents=True, exist_ok=True)
    (output / "footprint.json").write_text(text + "\n")
    click.echo(text)


if __name__ == "__main__":
    main()
