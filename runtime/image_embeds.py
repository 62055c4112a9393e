"""Image features in a file: an image is encoded once and used many times, without the image encoder.

A `.safetensors` file with one tensor, named by the feature and shaped as diffusers takes `ip_adapter_image_embeds`:
(2, images, ...), the negative half first. Its metadata names the image encoder by sha256.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ipa.engines.bundle import Bundle
from ipa.engines.engine import Array
from ipa.engines.errors import RequestError
from ipa.engines.manifest import AdapterRecord
from ipa.runtime.image_files import check_file
from ipa.runtime.output import write_bytes

_ENCODER = "image_encoder_sha256"
_DTYPES = ("F16", "F32", "F64")
_MAX_IMAGES = 64


def write_embeds(path: Path, features: Array, feature: str, bundle: Bundle) -> None:
    """Write the features of some images.

    Args:
        features: (2, images, ...) as the image encoder gives them.
        feature: their name.
    Raises:
        RequestError: the file cannot be written.
    """
    metadata = {_ENCODER: bundle.manifest.components["image_encoder"].sha256}
    write_bytes(save({feature: np.ascontiguousarray(features)}, metadata), path)


def read_embeds(path: Path, adapter: AdapterRecord, bundle: Bundle) -> Array:
    """The features that `write_embeds` wrote, (2, images, ...).

    Args:
        adapter: that will read them.
    Raises:
        RequestError: the file is missing or damaged, or its features are not what the adapter reads.
    """
    try:
        check_file(path, "image embeds")
        with safe_open(path, framework="numpy") as file:
            _check_features(file, path, adapter)
            features: Array = file.get_tensor(adapter.feature)
            metadata = file.metadata() or {}
    except (OSError, SafetensorError, ValueError) as error:
        raise RequestError(
            f"image embeds {path}: cannot be read ({error}); make them with --save-image-embeds"
        ) from error
    if not np.isfinite(features).all():
        raise RequestError(f"image embeds {path} hold NaN or infinity; make them again with --save-image-embeds")
    if metadata.get(_ENCODER) not in (None, bundle.manifest.components["image_encoder"].sha256):
        raise RequestError(f"image embeds {path} were made with another image encoder than that of {bundle.root}")
    return features.astype(adapter.component.spec.inputs[0].dtype)


def _check_features(file: Any, path: Path, adapter: AdapterRecord) -> None:
    """Refuse a file by its header, before any tensor is read."""
    axes = adapter.component.spec.inputs[0].axes[1:]
    slices = {name: file.get_slice(name) for name in sorted(file.keys())}
    found = {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    dtype, shape = found.get(adapter.feature, ("", ()))
    if dtype not in _DTYPES or shape[:1] != (2,) or shape[2:] != axes or not 1 <= shape[1] <= _MAX_IMAGES:
        listed = ", ".join(f"{name} {dtype}{shape}" for name, (dtype, shape) in [*found.items()][:8])
        raise RequestError(
            f"image embeds {path} hold {listed or 'nothing'}; the adapter reads {adapter.feature} (2, images, "
            f"{', '.join(map(str, axes))}) of at most {_MAX_IMAGES} images, in {', '.join(_DTYPES)}"
        )
