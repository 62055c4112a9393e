"""What a bundle holds, for people and for programs. Needs neither torch nor onnx."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, TypeGuard

from ipa.engines.bundle import Bundle
from ipa.engines.manifest import ComponentRecord, FileRecord, Manifest


def as_json(bundle: Bundle) -> str:
    """The manifest, with the bundle's path and size."""
    manifest = bundle.manifest
    record: dict[str, Any] = {"path": str(bundle.root), "size": _size(manifest.files()), **asdict(manifest)}
    return json.dumps(record, indent=1)


def as_text(bundle: Bundle) -> str:
    """A page to read."""
    return "\n".join(_lines(bundle))


def _lines(bundle: Bundle) -> Iterator[str]:
    manifest = bundle.manifest
    layers = manifest.kv_layout.layers
    yield f"{bundle.root}: {manifest.family}, {_mebibytes(_size(manifest.files()))}, files and hashes verified"
    yield f"made with {', '.join(f'{name} {version}' for name, version in manifest.created_by.items())}"
    yield f"keys and values: {len(layers)} cross-attention layers, {manifest.kv_layout.size} wide"
    yield from _changes(manifest)
    yield ""
    for name, component in manifest.components.items():
        yield from _component(name, component)
    for name, adapter in manifest.adapters.items():
        is_default = name == manifest.defaults.adapter
        yield from _component(f"ip_adapter/{name}", adapter.component)
        yield (
            f"    {adapter.kind}, {adapter.tokens} tokens per image, reads {adapter.feature} "
            f"(negative half: {adapter.negative})"
        )
        yield f"    made of {adapter.source_sha256[:16]}{', default' if is_default else ''}"
    for name, control in manifest.controlnets.items():
        yield from _component(f"controlnet/{name}", control.component)
        yield f"    made of {control.source}{', global: for the positive half alone' if control.is_global else ''}"
    if not manifest.adapters:
        yield "no adapters; add one with `ipa-export adapter`"
    yield ""
    defaults = {name: value for name, value in asdict(manifest.defaults).items() if value != ""}
    yield f"defaults: {', '.join(f'{name} {value}' for name, value in defaults.items())}"
    yield from _validation(manifest)


def _changes(manifest: Manifest) -> Iterator[str]:
    """What the base model was made of, where it is no plain pipeline."""
    for part, source in manifest.sources.items():
        yield f"{part}: {source.name}{f', sha256 {source.sha256[:16]}' if source.sha256 else ''}"
    for lora in manifest.loras:
        yield f"lora: {lora.name} x {lora.scale:g}, sha256 {lora.sha256[:16]}"
    for word in manifest.textual_inversions:
        yield f"textual inversion: {word.token}, {word.vectors} tokens, of {word.name}, sha256 {word.sha256[:16]}"
    if manifest.clip_skip:
        encoders = "the text encoder" if manifest.tokenizer_2 is None else "both text encoders"
        yield f"clip skip: {manifest.clip_skip} layers of {encoders} left out"


def _component(name: str, component: ComponentRecord) -> Iterator[str]:
    graph = component.files[0]
    yield f"{name}  {component.dtype}  {_mebibytes(_size(component.files))}  sha256 {graph.sha256[:16]}"
    yield from (f"    {engine} runs {file.path}, over the same weights" for engine, file in component.variants.items())
    for arrow, tensors in (("<-", component.spec.inputs), ("->", component.spec.outputs)):
        for tensor in tensors:
            yield f"    {arrow} {tensor.name} {tensor}"


def _validation(manifest: Manifest) -> Iterator[str]:
    if not manifest.validation:
        yield "validation: none yet; run `ipa-export validate`"
        return
    checks = manifest.validation.get("checks")
    if not _are_checks(checks):
        yield "validation: recorded in another way than `ipa-export validate` does; run it again"
        return
    failed = [check["name"] for check in checks if not check["passed"]]
    open_ones = [check["name"] for check in checks if not check.get("is_judged", True)]
    yield f"validation: {len(checks) - len(failed) - len(open_ones)} of {len(checks)} checks passed"
    yield from (f"    failed: {name}" for name in failed)
    yield from (f"    not judged: {name}" for name in open_ones)
    known = {check["name"] for check in checks}
    yield from (f"    added since, not judged: {name}" for name in manifest.graphs() if name not in known)


def _are_checks(found: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Whether a manifest's checks can be read; who wrote the bundle chose them."""
    return isinstance(found, list) and all(
        isinstance(check, dict) and isinstance(check.get("name"), str) and isinstance(check.get("passed"), bool)
        for check in found
    )


def _size(files: tuple[FileRecord, ...]) -> int:
    return sum(file.size for file in files)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
