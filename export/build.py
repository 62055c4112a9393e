"""From weights to a bundle, and one more adapter into a bundle."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from torch import nn

from ipa.engines.bundle import Bundle, hash_file
from ipa.engines.errors import BundleError, IpaError
from ipa.engines.manifest import FILE_NAME, AdapterRecord, ComponentRecord, ControlNetRecord, FileRecord, Manifest
from ipa.engines.spec import ONE_SLOT, SDXL, ImageSlots, family_specs
from ipa.export.adapters import AdapterFile, AdapterWeights, adapter_graph, read_adapter
from ipa.export.changes import BaseChanges
from ipa.export.controlnets import ControlNetSource, read_controlnets
from ipa.export.dimensions import base_dimensions, manifest_dimensions
from ipa.export.graphs import component_modules, typed_graph
from ipa.export.hoist import config_kv_layout
from ipa.export.merged import MergedOptions, export_merged
from ipa.export.onnx_export import MODEL_FILE, Graph, export_graph
from ipa.export.pipeline import BasePipeline
from ipa.export.progress import Progress, silent
from ipa.export.publish import locked_bundle, staged_bundle, sync_tree, update_manifest, write_whole
from ipa.export.versions import created_by
from ipa.export.winograd import ENGINE as WINOGRAD_ENGINE
from ipa.export.winograd import guidance_pair_sizes, write_winograd_graph

SCHEDULER_FILE = "scheduler/scheduler_config.json"
ADAPTER_FOLDER = "ip_adapter"
CONTROLNET_FOLDER = "controlnet"


@dataclass(frozen=True)
class ExportRequest:
    """What `ipa-export onnx` was asked for."""

    base: str
    output: Path
    image_encoder: str | None = None
    adapters: tuple[AdapterFile, ...] = ()
    dtype: str = "float32"  # or float16
    opset: int = 18
    force: bool = False
    merged: MergedOptions | None = None
    slots: ImageSlots = ONE_SLOT
    controlnets: tuple[ControlNetSource, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)  # fields of `Defaults` that differ
    changes: BaseChanges = field(default_factory=BaseChanges)


def export_bundle(request: ExportRequest, progress: Progress = silent) -> Manifest:
    """Write a bundle.

    Configurations and adapter files are checked before the minutes of work start; parts of the base model are
    loaded one at a time.

    Returns:
        The manifest that was written.
    Raises:
        IpaError: the base model or an adapter does not fit, or the bundle could not be written.
    """
    base = BasePipeline(request.base, request.image_encoder, request.changes)
    layout = config_kv_layout(base.unet_config)
    dimensions = base_dimensions(base, layout)
    _refuse_overwriting_sources(request)
    weights = {file.name: read_adapter(file.path, layout, dimensions) for file in request.adapters}
    if len(weights) < len(request.adapters):
        raise IpaError("two adapters have the same name; name them with --adapter NAME=FILE")
    if request.merged and not weights:
        raise IpaError("--merged puts an adapter into the graph; pass one with --adapter")
    if request.merged and request.slots != ONE_SLOT:
        raise IpaError("--merged has room for one adapter; leave out --image-slots and --masks")
    if request.merged and request.controlnets:
        raise IpaError("--merged has no room for ControlNets; leave out --controlnet")
    controlnets = read_controlnets(request.controlnets, base)
    residuals = controlnets[0].spec.outputs if controlnets else ()

    defaults = replace(base.defaults, **request.defaults)
    usual_sizes = guidance_pair_sizes(defaults.height, defaults.width, base.vae_record.downscale)
    with staged_bundle(request.output, request.force) as root:
        tokenizer, scheduler = _write_tokenizer(root, base, "tokenizer"), _write_scheduler(root, base)
        tokenizer_2 = _write_tokenizer(root, base, "tokenizer_2") if base.family == SDXL else None

        def add(graph: Graph, folder: str) -> ComponentRecord:
            progress(graph.name)
            component = _component(root, graph, export_graph(graph, root / folder / MODEL_FILE, request.opset))
            variant = write_winograd_graph(root / folder / MODEL_FILE, usual_sizes)
            return replace(component, variants={WINOGRAD_ENGINE: _file_record(root, variant)}) if variant else component

        components: dict[str, ComponentRecord] = {}
        text_kv: nn.Module | None = None
        for name, module in component_modules(base, request.slots, residuals):
            dtype = "float32" if name.startswith("vae_") and base.needs_float32_vae else request.dtype
            graph = typed_graph(name, module, dimensions, dtype, base.family)
            components[name] = add(graph, name)
            if name == "text_kv":
                text_kv = module if request.merged else None
            if name == "unet" and request.merged and text_kv is not None:
                progress(request.merged.file.name)
                adapter = next(iter(weights.values()))
                export_merged(
                    request.merged, module, text_kv, adapter, dimensions, request.dtype, request.opset, base.family
                )
        manifest = Manifest(
            family=base.family,
            created_by=created_by(),
            kv_layout=layout,
            components={name: components[name] for name in family_specs(base.family)},
            adapters={},
            tokenizer=tokenizer,
            scheduler=scheduler,
            text_tokens=base.text_tokens,
            vae=base.vae_record,
            image_processor=base.image_processor,
            defaults=defaults,
            sources=base.sources,
            loras=base.loras,
            textual_inversions=base.textual_inversions,
            clip_skip=base.clip_skip,
            tokenizer_2=tokenizer_2,
            force_zeros_for_empty_prompt=base.force_zeros_for_empty_prompt,
        )
        for name, adapter in weights.items():
            graph = adapter_graph(name, adapter, dimensions, request.dtype)
            folder = f"{ADAPTER_FOLDER}/{name}"
            manifest = manifest.with_adapter(name, _adapter_record(adapter, add(graph, folder)))
        records = {
            control.name: ControlNetRecord(
                add(control.graph(dimensions, request.dtype), f"{CONTROLNET_FOLDER}/{control.name}"),
                control.origin,
                control.is_global,
            )
            for control in controlnets
        }
        manifest = replace(manifest, controlnets=records)
        write_whole(root / FILE_NAME, manifest.to_json())
    return manifest


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
        if file.name in manifest.adapters and not force:
            raise BundleError(f"{root} has an adapter '{file.name}' already; replace it with --force")
        dimensions, dtype = manifest_dimensions(manifest), manifest.components["unet"].dtype
        weights = read_adapter(file.path, manifest.kv_layout, dimensions)
        graph = adapter_graph(file.name, weights, dimensions, dtype)
        progress(graph.name)
        adapters = root / ADAPTER_FOLDER
        adapters.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=adapters) as partial:
            staging = Path(partial) / file.name
            export_graph(graph, staging / MODEL_FILE, opset)
            sync_tree(staging)
            folder = _unused(adapters, manifest, file.name)
            staging.rename(folder)
        files = (folder / MODEL_FILE, *folder.glob("*.data"))
        record = _adapter_record(weights, _component(root, graph, files))

        def change(manifest: Manifest) -> Manifest:
            changed = manifest.with_adapter(file.name, record)
            return replace(changed, defaults=replace(changed.defaults, adapter=file.name)) if is_default else changed

        manifest = update_manifest(root, change)
        _remove_unlisted(adapters, manifest)
    return manifest


def _unused(adapters: Path, manifest: Manifest, name: str) -> Path:
    """A folder for an adapter that the manifest does not name; what a killed command left there is removed."""
    listed = _adapter_folders(manifest)
    folder = next(path for path in chain([name], (f"{name}.{n}" for n in count(2))) if path not in listed)
    shutil.rmtree(adapters / folder, ignore_errors=True)
    return adapters / folder


def _remove_unlisted(adapters: Path, manifest: Manifest) -> None:
    listed = _adapter_folders(manifest)
    for folder in adapters.iterdir():
        if folder.name not in listed:
            shutil.rmtree(folder, ignore_errors=True)


def _adapter_folders(manifest: Manifest) -> set[str]:
    return {Path(adapter.component.files[0].path).parent.name for adapter in manifest.adapters.values()}


def _component(root: Path, graph: Graph, files: Sequence[Path]) -> ComponentRecord:
    dtype = "float16" if any(tensor.dtype == "float16" for tensor in graph.spec.outputs) else "float32"
    return ComponentRecord(tuple(_file_record(root, file) for file in files), dtype, graph.spec)


def _file_record(root: Path, path: Path) -> FileRecord:
    return FileRecord(path.relative_to(root).as_posix(), path.stat().st_size, hash_file(path))


def _adapter_record(weights: AdapterWeights, component: ComponentRecord) -> AdapterRecord:
    kind = weights.kind
    return AdapterRecord(component, kind.name, weights.tokens, kind.feature, kind.negative, weights.source_sha256)


def _write_tokenizer(root: Path, base: BasePipeline, part: str) -> FileRecord:
    path = root / part / "tokenizer.json"
    path.parent.mkdir()
    base.load_tokenizer(part).save(str(path))
    return _file_record(root, path)


def _write_scheduler(root: Path, base: BasePipeline) -> FileRecord:
    path = root / SCHEDULER_FILE
    path.parent.mkdir()
    path.write_text(json.dumps(base.scheduler_config, indent=2) + "\n", "utf-8")
    return _file_record(root, path)


def _refuse_overwriting_sources(request: ExportRequest) -> None:
    """Nothing that is read may lie in the folder that is replaced."""
    output = request.output.resolve()
    sources: list[str | Path] = [
        request.base,
        request.image_encoder or request.base,
        *(file.path for file in request.adapters),
        *(source.location for source in request.controlnets),
        *request.changes.paths,
    ]
    for source in map(Path, sources):
        if source.exists() and source.resolve().is_relative_to(output):
            raise BundleError(f"--output {request.output} would replace {source}, which is read; choose another folder")
