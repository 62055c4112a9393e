"""What an arm's pictures depend on beside the request, as hashes: when one changes, pictures are not mixed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from ipa.benchmarks.origin import machine
from ipa.engines.bundle import hash_file
from ipa.engines.manifest import Manifest

_BASE_FILES = (
    "model_index.json",
    "unet/*",
    "vae/*",
    "text_encoder/*",
    "text_encoder_2/*",
    "tokenizer/*",
    "tokenizer_2/*",
    "scheduler/*",
    "feature_extractor/*",
    "image_encoder/*",
)


def base_sha256(base: Path) -> str:
    """Of the files that a pipeline is loaded from."""
    return files_sha256(base, (file for pattern in _BASE_FILES for file in base.glob(pattern)))


def files_sha256(root: Path, files: Iterable[Path]) -> str:
    """Of files' names below a folder and what they hold."""
    found = sorted(file for file in files if file.is_file())
    listed = [f"{file.relative_to(root).as_posix()} {hash_file(file)}\n" for file in found]
    return hashlib.sha256("".join(listed).encode()).hexdigest()


def code_sha256(*modules: ModuleType) -> str:
    """Of the sources of modules and of all that is in packages."""
    sums = []
    for module in modules:
        assert module.__file__ is not None
        file = Path(module.__file__)
        sums.append(files_sha256(file.parent, file.parent.rglob("*.py") if hasattr(module, "__path__") else [file]))
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def manifest_sha256(manifest: Manifest) -> str:
    """Of a manifest but for its validation's figures: values such as scaling factors, and every file's hash."""
    return hashlib.sha256(replace(manifest, validation={}).to_json().encode()).hexdigest()


def machine_name() -> str:
    """Of processor and GPU: kernels round as they are written for them."""
    found = machine()
    return "; ".join(filter(None, (found["cpu"], found["gpu"])))
