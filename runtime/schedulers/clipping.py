"""Predicted clean latents, held to a range."""

from __future__ import annotations

import numpy as np

from ipa.runtime.schedulers.config import ClippingConfig, ThresholdingConfig
from ipa.runtime.schedulers.schedule import Array


def clipped(config: ClippingConfig, clean: Array) -> Array:
    """Clean latents after whichever of the two the configuration asks for."""
    if config.clip_sample and not config.thresholding:
        return np.clip(clean, -config.clip_sample_range, config.clip_sample_range)
    return thresholded(config, clean)


def thresholded(config: ThresholdingConfig, clean: Array) -> Array:
    """Dynamic thresholding, picture by picture, if it is on. Source: arXiv:2205.11487, section 2.3."""
    if not config.thresholding:
        return clean
    axes = tuple(range(1, clean.ndim))
    quantile = np.quantile(np.abs(clean), config.dynamic_thresholding_ratio, axis=axes, keepdims=True)
    limit = np.minimum(np.maximum(quantile, 1), config.sample_max_value).astype(clean.dtype)
    limited: Array = np.clip(clean, -limit, limit) / limit
    return limited
