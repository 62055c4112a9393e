"""`ipa-export build-engines` as tests call it, its report, and graphs that a builder refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
from click.testing import CliRunner

from ipa.engines.bundle import hash_file
from ipa.engines.manifest import FILE_NAME, FileRecord, Manifest
from ipa.export.cli import main

OPTIONS = ("--resolution", "128x128", "--resolution", "64x192", "--batch", "1:1:2", "--image-tokens", "4:4:16")


def build(bundle: Path, cache: Path, *more: str, options: tuple[str, ...] = OPTIONS) -> Any:
    arguments = ["--bundle", str(bundle), "--cache", str(cache), "--engine", "tensorrt-rtx", *options, *more]
    return CliRunner().invoke(main, ["build-engines", *arguments])


def reasons(output: str) -> dict[str, str]:
    """What the report says of each component: `kept` or `built`, and why."""
    lines = re.finditer(r"^(\S+) +[0-9.]+ MiB  (kept|built)[^(]*\((.*)\)$", output, re.MULTILINE)
    return {line[1]: f"{line[2]}: {line[3]}" for line in lines}


def change_graph(bundle: Path, component: str, change: Any) -> None:
    """Change a graph and let the manifest agree, as another export would."""
    path = bundle / component / "model.onnx"
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    manifest = Manifest.from_json((bundle / FILE_NAME).read_text())
    record = manifest.components[component]
    file = FileRecord(record.files[0].path, path.stat().st_size, hash_file(path))
    components = {**manifest.components, component: replace(record, files=(file,))}
    (bundle / FILE_NAME).write_text(replace(manifest, components=components).to_json())


def use_unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "Nonsense"
