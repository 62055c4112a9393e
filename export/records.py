"""What a manifest says of the files of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ipa.engines.bundle import hash_file
from ipa.engines.manifest import AdapterRecord, ComponentRecord, FileRecord
from ipa.export.adapters import AdapterWeights
from ipa.export.onnx_export import Graph

ADAPTER_FOLDER = "ip_adapter"


def file_record(root: Path, path: Path) -> FileRecord:
    """A file of the bundle at `root`."""
    return FileRecord(path.relative_to(root).as_posix(), path.stat().st_size, hash_file(path))


def component_record(root: Path, graph: Graph, files: Sequence[Path]) -> ComponentRecord:
    """A graph that was exported as `files`, `model.onnx` first."""
    dtype = "float16" if any(tensor.dtype == "float16" for tensor in graph.spec.outputs) else "float32"
    return ComponentRecord(tuple(file_record(root, file) for file in files), dtype, graph.spec)


def adapter_record(weights: AdapterWeights, component: ComponentRecord) -> AdapterRecord:
    """An adapter whose graph is `component`."""
    kind = weights.kind
    return AdapterRecord(component, kind.name, weights.tokens, kind.feature, kind.negative, weights.source_sha256)
