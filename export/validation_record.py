"""Figures of a validation, as the bundle keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ipa.engines.errors import IpaError
from ipa.engines.manifest import Manifest
from ipa.engines.registry import backend_named
from ipa.export.checks import Check
from ipa.export.publish import locked_bundle, update_manifest
from ipa.export.versions import created_by

REFERENCE_ENGINE = "onnxruntime"  # whose figures are kept in the bundle


def record(root: Path, checks: Sequence[Check], source: Manifest) -> None:
    """Write the figures into the bundle's manifest.

    Args:
        source: the manifest that was validated.
    Raises:
        IpaError: the bundle has changed since.
    """
    figures = {
        "passed": all(check.passed for check in checks),
        "engine": f"{REFERENCE_ENGINE} {backend_named(REFERENCE_ENGINE).version}",
        "versions": created_by(),
        "checks": [_finite(asdict(check)) for check in checks],
    }

    def add(manifest: Manifest) -> Manifest:
        if manifest.files() != source.files():
            raise IpaError(f"{root} has changed while it was validated; run `ipa-export validate` again")
        return replace(manifest, validation=figures)

    with locked_bundle(root):
        update_manifest(root, add)


def _finite(check: dict[str, object]) -> dict[str, object]:
    """Infinity is not JSON."""
    return {key: None if value == float("inf") else value for key, value in check.items()}
