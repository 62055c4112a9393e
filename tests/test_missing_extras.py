"""Every command is installed with the runtime alone, too: without its libraries it names the extra that has them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

LIBRARIES = (
    *("torch", "transformers", "diffusers", "accelerate", "onnx", "onnxscript"),
    *("jinja2", "matplotlib", "pydantic", "torchmetrics", "tqdm"),
)
ADAPTER = "--base x --image-encoder x --data x.json --image-root x --steps 1"


@pytest.mark.parametrize(
    ("module", "extra", "command"),
    [
        ("benchmarks", "bench", "speed --output OUT"),
        ("benchmarks", "bench", "quality --output OUT"),
        ("benchmarks", "bench", "report --records . --output OUT"),
        ("export", "export", "onnx --base x --output OUT"),
        ("export", "export", "adapter --bundle BUNDLE --adapter x.safetensors"),
        ("export", "export", "validate --bundle BUNDLE --base x"),
        ("export", "export", "build-engines --bundle BUNDLE --engine tensorrt-rtx"),
        ("trainer", "train", "demo --output OUT"),
        ("trainer", "train", f"adapter {ADAPTER} --output OUT"),
    ],
)
def test_without_its_extra_it_names_the_extra(
    module: str, extra: str, command: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    code = f"import sys; sys.modules |= dict.fromkeys({LIBRARIES!r}); from ipa.{module}.cli import main; main()"
    places = {"OUT": str(tmp_path / "out"), "BUNDLE": str(tiny_bundle)}
    arguments = [places.get(word, word) for word in command.split()]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path)
    name = {"benchmarks": "ipa-bench", "export": "ipa-export", "trainer": "ipa-train"}[module]
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"{name}: \w+ is missing: pip install 'ipa-runtime\[{extra}\]'\n", done.stderr), done.stderr
    assert not (tmp_path / "out").exists()
