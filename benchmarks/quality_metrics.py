"""The figures of quality: similarities, Fréchet distance, PSNR, each with what chance leaves open.

Samples of one image prompt are alike, so the image prompts are what is resampled, not the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from tqdm import tqdm

from ipa.benchmarks.intervals import Interval, bootstrap
from ipa.benchmarks.quality_models import Vector

FID_RESAMPLES = 10
STUDENT_T = 2.262  # of FID_RESAMPLES - 1 degrees of freedom: 95 % lie within
FID_INTERVAL = (
    f"{STUDENT_T:.2f} standard errors (Student's t) of {FID_RESAMPLES} resamples of the image prompts; not "
    "percentiles: fewer distinct pictures raise FID itself"
)


def cosines(pictures: Sequence[Sequence[Vector]], others: Sequence[Vector]) -> list[float]:
    """How like pictures are what they should be like: each image prompt's mean cosine.

    Args:
        pictures: vectors of each image prompt's samples.
        others: one vector for each image prompt.
    """
    return [
        float(np.mean([cosine(one, other) for one in samples])) for samples, other in zip(pictures, others, strict=True)
    ]


def similarity(pictures: Sequence[Sequence[Vector]], others: Sequence[Vector]) -> Interval:
    """The mean of `cosines`."""
    return bootstrap(cosines(pictures, others), np.mean)


def mean_of_means(values: Sequence[Sequence[float]]) -> Interval:
    """Over image prompts, of each one's samples."""
    return bootstrap([float(np.mean(samples)) for samples in values], np.mean)


def median_of_medians(values: Sequence[Sequence[float]]) -> Interval | None:
    """Over image prompts, of each one's finite samples; `None` without any."""
    finite = [[value for value in samples if math.isfinite(value)] for samples in values]
    medians = [float(np.median(samples)) for samples in finite if samples]
    return bootstrap(medians, np.median) if medians else None


def cosine(first: Vector, second: Vector) -> float:
    """Of the angle between two vectors."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def fid(pictures: Sequence[Sequence[Vector]], real: Sequence[Vector], seed: int = 0) -> Interval:
    """Fréchet distance of pictures to the data's, see `FID_INTERVAL`.

    Args:
        pictures: features of each image prompt's samples, two image prompts at least.
        real: features of each one's picture in the data.
    """
    drawn, shown = np.stack([np.stack(samples) for samples in pictures]), np.stack(real)
    value = frechet_distance(shown, drawn.reshape(-1, drawn.shape[-1]))
    chosen = np.random.default_rng(seed).integers(len(shown), size=(FID_RESAMPLES, len(shown)))
    bar = tqdm(chosen, "FID of resamples", disable=None, leave=False)
    again = [frechet_distance(shown[index], drawn[index].reshape(-1, drawn.shape[-1])) for index in bar]
    error = STUDENT_T * float(np.std(again, ddof=1))
    return Interval(value, value - error, value + error, len(shown))


class _Features(nn.Module):
    """What torchmetrics takes for its feature extractor where the features are there already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """They themselves."""
        return features


def frechet_distance(real: NDArray[np.float32], drawn: NDArray[np.float32]) -> float:
    """Of two sets of features, (n, width) each, as Gaussians. Source: arXiv:1706.08500, formula (6)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(_Features(real.shape[1]))
    for features, is_real in ((real, True), (drawn, False)):
        metric.update(torch.from_numpy(features.astype(np.float64)), real=is_real)
    return float(metric.compute())


def psnr(first: Path, second: Path) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures of one size, decibels; of equal ones infinite."""
    with Image.open(first) as one, Image.open(second) as other:
        a, b = (np.asarray(image.convert("RGB"), np.int32) for image in (one, other))
    error = float(np.mean((a - b) ** 2))
    return math.inf if error == 0 else 10 * float(np.log10(255**2 / error))
