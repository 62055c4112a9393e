"""From weights to a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from ipa.engines.errors import BundleError, IpaError
from ipa.engines.manifest import FILE_NAME, ComponentRecord, ControlNetRecord, FileRecord, Manifest
from ipa.engines.scheduler_names import SCHEDULER_CLASSES
from ipa.engines.spec import ONE_SLOT, SDXL, ImageSlots, family_specs
from ipa.export.adapters import AdapterFile, adapter_graph, read_adapter
from ipa.export.changes import BaseChanges
from ipa.export.controlnets import ControlNetSource, read_controlnets
from ipa.export.dimensions import base_dimensions
from ipa.export.graphs import component_modules, typed_graph
from ipa.export.merged import MergedOptions, check_merged, export_merged, staged_merged
from ipa.export.onnx_export import MODEL_FILE, Graph, export_graph
from ipa.export.pipeline import BasePipeline
from ipa.export.progress import Progress, silent
from ipa.export.publish import staged_bundle, write_whole
from ipa.export.records import ADAPTER_FOLDER, adapter_record, component_record, file_record
from ipa.export.versions import created_by
from ipa.export.winograd import ENGINE as WINOGRAD_ENGINE
from ipa.export.winograd import guidance_pair_sizes, write_winograd_graph

SCHEDULER_FILE = "scheduler/scheduler_config.json"
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
    _refuse_overwriting(request)
    base = BasePipeline(request.base, request.image_encoder, request.changes)
    layout, dimensions = base.kv_layout, base_dimensions(base)
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
    total = len(family_specs(base.family)) + len(weights) + len(controlnets) + (request.merged is not None)
    with staged_merged(request.merged) as beside, staged_bundle(request.output, request.force) as root:
        tokenizer, scheduler = _write_tokenizer(root, base, "tokenizer"), _write_scheduler(root, base)
        tokenizer_2 = _write_tokenizer(root, base, "tokenizer_2") if base.family == SDXL else None

        def add(graph: Graph, folder: str) -> ComponentRecord:
            progress(graph.name, total)
            component = component_record(root, graph, export_graph(graph, root / folder / MODEL_FILE, request.opset))
            variant = write_winograd_graph(root / folder / MODEL_FILE, usual_sizes)
            return replace(component, variants={WINOGRAD_ENGINE: file_record(root, variant)}) if variant else component

        components: dict[str, ComponentRecord] = {}
        text_kv: nn.Module | None = None
        for name, module in component_modules(base, request.slots, residuals):
            dtype = "float32" if name.startswith("vae_") and base.needs_float32_vae else request.dtype
            graph = typed_graph(name, module, dimensions, dtype, base.family)
            components[name] = add(graph, name)
            if name == "text_kv":
                text_kv = module if request.merged else None
            if name == "unet" and request.merged and text_kv is not None:
                progress(request.merged.file.name, total)
                export_merged(
                    request.merged,
                    beside,
                    module,
                    text_kv,
                    *next(iter(weights.items())),
                    dimensions,
                    request.dtype,
                    request.opset,
                    base.family,
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
            manifest = manifest.with_adapter(name, adapter_record(adapter, add(graph, folder)))
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


def scheduler_advice(root: Path, manifest: Manifest) -> str | None:
    """What to know of a bundle whose scheduler the runtime does not have; `None`: it has it."""
    name = json.loads((root / manifest.scheduler.path).read_text("utf-8")).get("_class_name")
    if name in SCHEDULER_CLASSES:
        return None
    return (
        f"the base model's scheduler is {name}, which ipa-run does not have: every request must choose another with "
        f"--scheduler, one of {', '.join(SCHEDULER_CLASSES.values())}"
    )


def _write_tokenizer(root: Path, base: BasePipeline, part: str) -> FileRecord:
    path = root / part / "tokenizer.json"
    path.parent.mkdir()
    base.load_tokenizer(part).save(str(path))
    return file_record(root, path)


def _write_scheduler(root: Path, base: BasePipeline) -> FileRecord:
    path = root / SCHEDULER_FILE
    path.parent.mkdir()
    path.write_text(json.dumps(base.scheduler_config, indent=2) + "\n", "utf-8")
    return file_record(root, path)


def _refuse_overwriting(request: ExportRequest) -> None:
    """Nothing that is read may lie where something is written."""
    named: list[str | Path] = [
        request.base,
        request.image_encoder or request.base,
        *(file.path for file in request.adapters),
        *(source.location for source in request.controlnets),
        *request.changes.paths,
    ]
    sources, output = [path for path in map(Path, named) if path.exists()], request.output.resolve()
    for source in sources:
        if source.resolve().is_relative_to(output):
            raise BundleError(f"--output {request.output} would replace {source}, which is read; choose another folder")
    if request.merged:
        check_merged(request.merged.file, request.output, sources, request.force)
