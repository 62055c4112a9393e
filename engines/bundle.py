"""Opening a bundle: nothing in it is used before paths, sizes, hashes and external data are checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ipa.engines.engine import Engine, GraphFile
from ipa.engines.errors import BundleError, RequestError
from ipa.engines.manifest import FILE_NAME, AdapterRecord, ComponentRecord, ControlNetRecord, FileRecord, Manifest
from ipa.engines.onnx_file import external_data
from ipa.engines.registry import Choice, open_engine, resolve_engine
from ipa.engines.spec import family_specs

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_MANIFEST_LIMIT = 16 * 2**20  # bytes; a real one has some 20 kB
_HASHING_THREADS = 4


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder, its manifest, and where engine plans for it are (see `GraphFile.plans`)."""

    root: Path
    manifest: Manifest
    plans: Path | None = None

    @classmethod
    def open(cls, root: Path, verify: bool = True, plans: Path | None = None) -> Bundle:
        """Read the manifest and check every file against it.

        Args:
            root: the bundle's folder.
            verify: hash the files too; sizes, paths and links are always checked.
            plans: folder of engine plans that the user trusts; `None`: the user's own cache.
        Raises:
            BundleError: says which file, what it is, what it should be, and what to do.
        """
        if not root.is_dir():
            raise BundleError(f"bundle {root} is not a folder; make one with `ipa-export onnx --output {root} ...`")
        path = root / FILE_NAME
        if not path.is_file():
            raise BundleError(f"{root} has no {FILE_NAME}: not a bundle, or an unfinished one; run `ipa-export onnx`")
        if path.stat().st_size > _MANIFEST_LIMIT:
            raise BundleError(
                f"{path} has {path.stat().st_size} bytes, more than any manifest; export the bundle again"
            )
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise BundleError(f"{path} is not UTF-8 text; export the bundle again") from error
        bundle = cls(root, Manifest.from_json(text), plans)
        family_specs(bundle.manifest.family)  # refuses one that is not known
        files = bundle.manifest.files()
        for file in files:
            _check_path(root, file)
        for file in files:
            _check_size(root, file)
        if verify:
            verify_files(root, files)
        for name, graph in bundle.manifest.graphs().items():
            _check_graph(root, name, graph)
        return bundle

    def file(self, record: FileRecord) -> Path:
        """Where a file lies."""
        return self.root / record.path

    def adapter(self, name: str) -> AdapterRecord:
        """An adapter by name.

        Raises:
            RequestError: lists the adapters that exist.
        """
        adapters = self.manifest.adapters
        if name not in adapters:
            known = ", ".join(sorted(adapters)) or "none"
            raise RequestError(
                f"{self.root} has no adapter '{name}' (it has: {known}); "
                f"add it with `ipa-export adapter --bundle {self.root} --adapter {name}=FILE`"
            )
        return adapters[name]

    def controlnet(self, name: str) -> ControlNetRecord:
        """A ControlNet by name.

        Raises:
            RequestError: lists those that exist.
        """
        controlnets = self.manifest.controlnets
        if name not in controlnets:
            known = ", ".join(sorted(controlnets)) or "none"
            raise RequestError(
                f"{self.root} has no ControlNet '{name}' (it has: {known}); "
                f"export it again with `ipa-export onnx ... --controlnet {name}=DIR_OR_ID`"
            )
        return controlnets[name]

    def resolve_engine(self, engine: str) -> Choice:
        """The back-end that a name stands for here. Adapters do not count: engines for them may come later.

        Raises:
            EngineError: see `ipa.engines.registry.resolve_engine`.
        """
        return resolve_engine(engine, [self.graph(name) for name in self.manifest.components])

    def graph(self, name: str, engine: str | None = None) -> GraphFile:
        """A graph as back-ends get it.

        Args:
            name: a component of the spec table, `ip_adapter/NAME` or `controlnet/NAME`.
            engine: whose variant of the graph is wanted, if it has one.
        Raises:
            BundleError, RequestError: the bundle has no such component, adapter or ControlNet.
        """
        kind, _, part = name.partition("/")
        if kind == "ip_adapter":
            record = self.adapter(part).component
        elif kind == "controlnet":
            record = self.controlnet(part).component
        elif name in self.manifest.components:
            record = self.manifest.components[name]
        else:
            raise BundleError(f"{self.root} has no component '{name}'; export it again with `ipa-export onnx`")
        file = record.variants.get(engine or "", record.files[0])
        return GraphFile(name, record.spec, self.file(file), record.sha256, self.root, self.plans)

    def open_component(self, name: str, engine: str) -> Engine:
        """Open a graph in a back-end.

        Args:
            name: a component of the spec table, `ip_adapter/NAME` or `controlnet/NAME`.
            engine: one of `ipa.engines.registry.ENGINE_NAMES`.
        Raises:
            BundleError, RequestError: the bundle has no such component, adapter or ControlNet.
            EngineError: the back-end is missing or cannot load the graph.
        """
        chosen = resolve_engine(engine, [self.graph(name)]).name
        return open_engine(chosen, self.graph(name, chosen))


def verify_files(root: Path, files: Sequence[FileRecord]) -> None:
    """Hash files of a bundle.

    Raises:
        BundleError: names the first one that is damaged.
    """
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        list(pool.map(lambda file: _check_hash(root, file), files))


def hash_file(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_path(root: Path, file: FileRecord) -> None:
    """Plain relative names only, and no link that leads out of the bundle."""
    parts = PurePosixPath(file.path).parts
    if not parts or "/".join(parts) != file.path or not all(_PART.fullmatch(part) for part in parts):
        raise BundleError(f"{FILE_NAME} names the file {file.path!r}, which is not a plain relative path; refused")
    inside = [root.resolve()]
    if root.parent.name == "snapshots":  # the Hub cache: files are links into the same repository's blobs
        inside.append(root.parent.parent.resolve() / "blobs")
    target = (root / file.path).resolve()
    if not any(target.is_relative_to(folder) for folder in inside):
        raise BundleError(f"{root / file.path} is a link that leads out of the bundle, to {target}; refused")


def _check_size(root: Path, file: FileRecord) -> None:
    path = root / file.path
    if not path.is_file():
        raise BundleError(f"{path} is missing; the bundle is incomplete, copy or export it again")
    size = path.stat().st_size
    if size != file.size:
        raise BundleError(f"{path} has {size} bytes, the manifest says {file.size}; copy or export the bundle again")


def _check_hash(root: Path, file: FileRecord) -> None:
    found = hash_file(root / file.path)
    if found != file.sha256:
        raise BundleError(
            f"{root / file.path} is damaged: sha256 {found[:16]}..., the manifest says {file.sha256[:16]}...; "
            "copy or export the bundle again"
        )


def _check_graph(root: Path, name: str, record: ComponentRecord) -> None:
    """External data lies in the files that the manifest lists for this component, and inside them."""
    if not record.files or any(PurePosixPath(graph.path).suffix != ".onnx" for graph in record.graphs):
        raise BundleError(f"{FILE_NAME}: '{name}' does not start with an .onnx file; export the bundle again")
    sizes = {file.path: file.size for file in record.files[1:]}
    for graph in record.graphs:
        _check_external_data(root / graph.path, PurePosixPath(graph.path).parent, sizes)


def _check_external_data(model: Path, folder: PurePosixPath, sizes: Mapping[str, int]) -> None:
    for entry in external_data(model):
        size = sizes.get(f"{folder}/{entry.location}")
        if size is None:
            raise BundleError(f"{model} wants data from {entry.location!r}, which is not one of its files; refused")
        length = size - entry.offset if entry.length is None else entry.length
        if entry.offset < 0 or length < 0 or entry.offset + length > size:
            end = entry.offset + length
            raise BundleError(
                f"{model} wants bytes {entry.offset} to {end} of {entry.location}, which has {size}; refused"
            )
