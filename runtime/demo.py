"""The embedded default: a small trained pipeline and a reference image that come with the package."""

from __future__ import annotations

from pathlib import Path

from ipa.engines.errors import BundleError

FOLDER = Path(__file__).parent / "assets"
BUNDLE = FOLDER / "demo_bundle"
REFERENCE = FOLDER / "reference.png"


def demo_bundle() -> Path:
    """The demo bundle's folder.

    Raises:
        BundleError: this installation came without it.
    """
    if not BUNDLE.is_dir():
        raise BundleError(
            f"this installation has no demo bundle ({BUNDLE} is missing): name one with `--bundle BUNDLE`, "
            "made by `ipa-export onnx`"
        )
    return BUNDLE
