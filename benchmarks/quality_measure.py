"""From drawn pictures to figures: which models look at them, and what is compared with what."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from ipa.benchmarks.intervals import Interval, bootstrap
from ipa.benchmarks.quality_data import Data
from ipa.benchmarks.quality_eye import Eye
from ipa.benchmarks.quality_lpips import Lpips
from ipa.benchmarks.quality_metrics import cosines, fid, mean_of_means, median_of_medians, psnr
from ipa.benchmarks.quality_models import Clip, DemoClip, Dino, Embedder, Inception, Vector, inception_obstacle
from ipa.benchmarks.quality_pictures import Drawn
from ipa.benchmarks.records import Difference, Gap, NotMeasured, Quality
from ipa.engines.errors import IpaError
from ipa.runtime.demo import demo_bundle
from ipa.runtime.image_files import open_image
from ipa.runtime.pipeline import Pipeline
from ipa.trainer.demo.evaluate import score
from ipa.trainer.demo.judge import SHIPPED, load_judge
from ipa.trainer.demo.shapes import IMAGE_SIZE

DEMO = "demo"
T = TypeVar("T")
RATES = {  # of `ipa.trainer.demo.evaluate.Scores`; the report's term says what counts as a hit
    "foreground": "foreground colour",
    "background": "background colour",
    "both": "both colours",
    "texture": "texture",
    "shape": "shape",
}


@dataclass(frozen=True)
class Eyes:
    """The models that look at the pictures; `None`: not asked for, or not to be had."""

    clip: Eye
    dino: Eye | None
    inception: Eye | None

    @property
    def has_text(self) -> bool:
        """Whether CLIP-T can be had."""
        return isinstance(self.clip.model, Clip)


def open_eyes(
    clip: str, dino: Path | None, inception: Path | None, folder: Path, stack: ExitStack
) -> tuple[Eyes, list[NotMeasured]]:
    """Load the models, all before anything is drawn.

    Args:
        clip: folder, or `demo`.
        dino: folder.
        inception: weights.
        folder: for what they see.
        stack: closes them.
    Returns:
        The models, and which figures there will not be.
    Raises:
        IpaError: one cannot be loaded.
    """

    def opened(model: Embedder) -> Eye:
        return stack.enter_context(Eye(model, folder))

    missing: list[NotMeasured] = []
    if clip == DEMO:
        see: Embedder = DemoClip(stack.enter_context(Pipeline.open(demo_bundle(), engine="onnxruntime")))
        reason = "the demo's CLIP is shipped without its text projection; give another with --clip DIR"
        missing.append(NotMeasured("CLIP-T", reason))
    else:
        see = Clip(Path(clip))
    if dino is None:
        missing.append(NotMeasured("DINO", "give a model with --dino DIR"))
    if inception is None:
        missing.append(NotMeasured("FID", "give torch-fidelity's Inception with --inception FILE"))
    elif obstacle := inception_obstacle():
        raise IpaError(f"--inception {inception}: {obstacle}")
    eyes = Eyes(
        clip=opened(see),
        dino=opened(Dino(dino)) if dino else None,
        inception=opened(Inception(inception)) if inception else None,
    )
    return eyes, missing


@dataclass(frozen=True)
class Measured:
    """An arm's figures.

    Attributes:
        figures: for the record.
        cosines: of each image prompt, its samples' mean, by the name of the figure that they make.
    """

    figures: Quality
    cosines: dict[str, list[float]]


def quality(name: str, title: str, drawn: Drawn, data: Data, eyes: Eyes) -> Measured:
    """Look at an arm's pictures."""
    items = data.items
    references = [eyes.clip.reference(item) for item in _bar(items, f"CLIP of image prompts ({name})")]
    seen = _seen(eyes.clip, drawn, f"CLIP of {name}")
    found = {"clip_i": cosines(seen, references)}
    if eyes.has_text:
        found["clip_t"] = cosines(seen, [eyes.clip.text(item.text) for item in items])
    if eyes.dino:
        shown = _seen(eyes.dino, drawn, f"DINO of {name}")
        found["dino"] = cosines(shown, [eyes.dino.reference(item) for item in _bar(items, "DINO of image prompts")])
    distance = None
    if eyes.inception and len(items) > 1:
        with Image.open(drawn.files[0][0]) as picture:
            size = picture.size
        real = [eyes.inception.real(item, size) for item in _bar(items, "Inception of the data")]
        distance = fid(_seen(eyes.inception, drawn, f"Inception of {name}"), real)
    means = {measure: bootstrap(values, np.mean) for measure, values in found.items()}
    figures = Quality(
        name=name,
        title=title,
        clip_i=means["clip_i"],
        clip_t=means.get("clip_t"),
        dino=means.get("dino"),
        fid=distance,
        rates=_rates(drawn, data),
        seconds_per_image=drawn.seconds_per_image,
    )
    return Measured(figures, found)


def gaps(first: Measured, second: Measured) -> list[Gap]:
    """How far two arms are apart in each measure, image prompt by image prompt.

    Their intervals say nothing of this: most of what they span is how image prompts differ, which both share.
    """
    found = []
    for measure, ours in first.cosines.items():
        apart = [one - other for one, other in zip(ours, second.cosines[measure], strict=True)]
        found.append(Gap(first.figures.name, second.figures.name, measure, bootstrap(apart, np.mean)))
    return found


def difference(first: str, second: str, one: Drawn, other: Drawn, lpips: Lpips | None) -> Difference:
    """How far apart the pictures of two arms are, pair by pair."""
    pairs = [list(zip(*files, strict=True)) for files in zip(one.files, other.files, strict=True)]

    def measured(distance: Callable[[Path, Path], float], title: str) -> list[list[float]]:
        return [[distance(a, b) for a, b in samples] for samples in _bar(pairs, f"{title} of {first} and {second}")]

    decibels = measured(psnr, "PSNR")
    lowest = min(map(min, decibels))
    return Difference(
        first=first,
        second=second,
        equal=mean_of_means([[float(value == math.inf) for value in samples] for samples in decibels]),
        psnr=median_of_medians(decibels),
        lowest_psnr=lowest if math.isfinite(lowest) else None,
        lpips=mean_of_means(measured(lpips, "LPIPS")) if lpips else None,
    )


def _rates(drawn: Drawn, data: Data) -> dict[str, Interval]:
    """What the demo's judge says; nothing of other data."""
    if not data.pairs:
        return {}
    judge, scores = load_judge(SHIPPED), []
    for pair, files in zip(data.pairs, drawn.files, strict=True):
        images = [_for_judge(open_image(file)) for file in files]
        scores.append(score(images, [pair] * len(images), judge))
    return {title: bootstrap([getattr(one, name) for one in scores], np.mean) for name, title in RATES.items()}


def _for_judge(image: Image.Image) -> Image.Image:
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return image if image.size == size else image.resize(size)


def _seen(eye: Eye, drawn: Drawn, title: str) -> list[list[Vector]]:
    return [[eye.picture(file) for file in files] for files in _bar(drawn.files, title)]


def _bar(items: Sequence[T], title: str) -> Iterable[T]:
    bar: Iterable[T] = tqdm(items, title, unit="item", disable=None, leave=False)
    return bar
