"""Calls of `ipa-bench quality`."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from ipa.benchmarks.cli import main

SMALL = ["--height", "64", "--width", "64", "--steps", "2", "--guidance-scale", "3", "--engine", "onnxruntime"]


def bench_quality(output: Path, *arguments: object) -> Result:
    """Run the command; its result."""
    return CliRunner().invoke(main, ["quality", "--output", str(output), *map(str, arguments)])
