"""One more adapter into a bundle, without a trace of what it replaces or of commands that were killed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

from ipa.engines.bundle import Bundle
from ipa.engines.errors import BundleError
from ipa.engines.manifest import FileRecord, Manifest
from ipa.export.adapters import AdapterFile, adapter_graph, read_adapter
from ipa.export.dimensions import manifest_dimensions
from ipa.export.onnx_export import MODEL_FILE, export_graph
from ipa.export.progress import Progress, silent
from ipa.export.publish import locked_bundle, sync_tree, update_manifest
from ipa.export.records import ADAPTER_FOLDER, adapter_record, component_record

_PARTIAL = ".partial-"
_OURS = {MODEL_FILE, f"{MODEL_FILE}.data"}


def add_adapter(
    root: Path, file: AdapterFile, force: bool, is_default: bool, opset: int = 18, progress: Progress = silent
) -> Manifest:
    """Add one adapter to a bundle; no other graph is touched, and the base model is not needed.

    The manifest is replaced last: until then the bundle is the old one, then the new one.

    Args:
        root: the bundle.
        force: replace an adapter of the same name.
        is_default: make it the one that requests get which name none.
    Returns:
        The manifest that was written.
    Raises:
        IpaError: the adapter does not fit the bundle, or its name is taken.
    """
    Bundle.open(root, verify=False)
    with locked_bundle(root):
        manifest = Bundle.open(root, verify=False).manifest
        old = manifest.adapters.get(file.name)
        if old is not None and not force:
            raise BundleError(f"{root} has an adapter '{file.name}' already; replace it with --force")
        dimensions, dtype = manifest_dimensions(manifest), manifest.components["unet"].dtype
        weights = read_adapter(file.path, manifest.kv_layout, dimensions)
        adapters = _folder(root)
        _remove_leftovers(root, adapters, manifest)
        graph = adapter_graph(file.name, weights, dimensions, dtype)
        progress(graph.name, 1)
        with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=adapters) as partial:
            staging = Path(partial) / file.name
            export_graph(graph, staging / MODEL_FILE, opset)
            sync_tree(staging)
            folder = _unused(adapters, file.name)
            staging.rename(folder)
        files = (folder / MODEL_FILE, *folder.glob("*.data"))
        record = adapter_record(weights, component_record(root, graph, files))

        def change(manifest: Manifest) -> Manifest:
            changed = manifest.with_adapter(file.name, record)
            return replace(changed, defaults=replace(changed.defaults, adapter=file.name)) if is_default else changed

        manifest = update_manifest(root, change)
        if old is not None:
            _remove_files(root, old.component.files, manifest)
    return manifest


def _folder(root: Path) -> Path:
    """The folder of a bundle's adapters, made when missing; what is behind a link is not the bundle's to change."""
    adapters = root / ADAPTER_FOLDER
    if adapters.is_symlink():
        raise BundleError(
            f"{adapters} is a link to {adapters.resolve()}, nothing is written there; put a folder in its place"
        )
    adapters.mkdir(exist_ok=True)
    return adapters


def _unused(adapters: Path, name: str) -> Path:
    """A path for an adapter's folder where nothing is."""
    paths = (adapters / path for path in chain([name], (f"{name}.{n}" for n in count(2))))
    return next(path for path in paths if not path.exists() and not path.is_symlink())


def _remove_leftovers(root: Path, adapters: Path, manifest: Manifest) -> None:
    """Remove what killed commands left: folders that hold an adapter's graph which the manifest does not name."""
    listed = _paths(root, manifest.files())
    for folder in adapters.iterdir():
        if folder.is_symlink() or not folder.is_dir():
            continue
        held = list(folder.iterdir())
        is_graph = {path.name for path in held} <= _OURS and not listed.intersection(held)
        if is_graph or folder.name.startswith(_PARTIAL):  # no path of a manifest starts with a dot
            shutil.rmtree(folder, ignore_errors=True)


def _remove_files(root: Path, files: Iterable[FileRecord], manifest: Manifest) -> None:
    """Remove the files of a replaced adapter that nothing else uses, and its folder when that is empty then."""
    for path in _paths(root, files) - _paths(root, manifest.files()):
        with suppress(OSError):  # the bundle is the new one already
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()


def _paths(root: Path, files: Iterable[FileRecord]) -> set[Path]:
    return {root / file.path for file in files}
