"""Ctrl-C on `ipa-run`: one line, exit code 130, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def test_ctrl_c_leaves_no_file(tiny_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from ipa.runtime.cli import main; main()", "--bundle", str(tiny_bundle)]
    command += ["--prompt", "a cat", "--steps", "900", "--height", "256", "--width", "256"]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "x.png")], stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    time.sleep(8)  # well inside the loop of 901 steps
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "ipa-run: interrupted; no picture was left half-written"
    assert list(tmp_path.iterdir()) == []


SWALLOWING = """
import time
from ipa.engines.onnxruntime_engine import OnnxRuntimeEngine
from ipa.runtime.cli import main

compute = OnnxRuntimeEngine.__call__

def swallowing(self, **inputs):
    try:
        if self.component == "unet":
            print("step", flush=True)
            time.sleep(0.5)
    except KeyboardInterrupt:
        pass
    return compute(self, **inputs)

OnnxRuntimeEngine.__call__ = swallowing
main()
"""


def test_ctrl_c_that_a_library_swallows_counts_all_the_same(tiny_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SWALLOWING, "--bundle", str(tiny_bundle), "--engine", "onnxruntime"]
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
