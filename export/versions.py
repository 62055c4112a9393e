"""What wrote a file: the versions that its numbers depend on."""

from __future__ import annotations

from importlib.metadata import version

_WRITERS = ("ipa-runtime", "torch", "diffusers", "transformers", "onnx", "onnxscript")


def created_by() -> dict[str, str]:
    """Version of every package that takes part in an export."""
    return {name: version(name) for name in _WRITERS}
