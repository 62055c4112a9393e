"""Ctrl-C on `ipa-run`: one line, exit code 130, nothing left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = """
import time
from ipa.engines.onnxruntime_engine import OnnxRuntimeEngine
from ipa.runtime.cli import main

compute = OnnxRuntimeEngine.__call__

def telling(self, **inputs):
    try:
        if self.component == "unet":
            print("step", flush=True)
            time.sleep(0.5)
    except KeyboardInterrupt:
        if not SWALLOWS:
            raise
    return compute(self, **inputs)

OnnxRuntimeEngine.__call__ = telling
main()
"""


@pytest.mark.parametrize("swallows", [False, True])
def test_ctrl_c_leaves_no_file(tiny_bundle: Path, tmp_path: Path, swallows: bool) -> None:
    """Inside the loop, and where a library that calls back into Python swallows the exception."""
    command = [sys.executable, "-c", COMMAND.replace("SWALLOWS", str(swallows)), "--bundle", str(tiny_bundle)]
    command += ["--engine", "onnxruntime"]
    command += ["--prompt", "a cat", "--steps", "900", "--height", "64", "--width", "64"]
    command += ["--output", str(tmp_path / "x.png")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(2):  # the loop is running
        assert process.stdout.readline() == "step\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, "ipa-run: interrupted; no picture was left half-written")
    assert list(tmp_path.iterdir()) == []
