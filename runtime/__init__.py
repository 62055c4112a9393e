"""From a request to a picture: numpy and one inference engine, no PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ipa.runtime.control_image import ControlImage as ControlImage
    from ipa.runtime.image_prompt import ImagePrompt as ImagePrompt
    from ipa.runtime.pipeline import Pipeline as Pipeline
    from ipa.runtime.pipeline import Result as Result
    from ipa.runtime.request import Request as Request

__all__ = ["ControlImage", "ImagePrompt", "Pipeline", "Request", "Result"]

_HOMES = {
    "ControlImage": "control_image",
    "ImagePrompt": "image_prompt",
    "Pipeline": "pipeline",
    "Request": "request",
    "Result": "pipeline",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `ipa-run --help` answers at once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ipa.runtime' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"ipa.runtime.{_HOMES[name]}"), name)
