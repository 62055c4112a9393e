"""How well generated images take their shape from the text and the rest from the image prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ipa.trainer.demo.colours import background_colour, foreground_colour
from ipa.trainer.demo.dataset import EVALUATION_SEED
from ipa.trainer.demo.judge import Judge
from ipa.trainer.demo.shapes import Pixels, Scene, all_scenes, draw, other_shape

PAIRS = 64


@dataclass(frozen=True)
class Pair:
    """A text and an image prompt, and what they ask for together.

    Attributes:
        target: the text's shape with the reference's colours and texture; training never drew it.
        reference_scene: what the image prompt shows: another shape.
        reference: the image prompt, drawn from seeds that training never used.
    """

    target: Scene
    reference_scene: Scene
    reference: Image.Image

    @property
    def prompt(self) -> str:
        """The text, which names the shape alone."""
        return f"a {self.target.shape}"


@dataclass(frozen=True)
class Scores:
    """Shares of images, 0 to 1.

    Attributes:
        foreground: the foreground colour is the reference's.
        background: the background colour is the reference's.
        both: both colours are the reference's.
        texture: the texture is the reference's, says the judge.
        shape: the shape is the text's, says the judge.
        reference_shape: the shape is the reference's, says the judge: leakage.
        images: how many were scored.
    """

    foreground: float
    background: float
    both: float
    texture: float
    shape: float
    reference_shape: float
    images: int


def held_out_pairs(count: int = PAIRS) -> list[Pair]:
    """The first `count` of a fixed, shuffled list of held-out combinations, each with its reference."""
    scenes = [scene for scene in all_scenes() if scene.is_held_out]
    order = np.random.default_rng(EVALUATION_SEED).permutation(len(scenes))
    return [_pair(scenes[index], number) for number, index in enumerate(order[:count])]


def _pair(target: Scene, number: int) -> Pair:
    rng = np.random.default_rng((EVALUATION_SEED, number))
    reference = other_shape(target, rng, held_out=True)
    return Pair(target, reference, Image.fromarray(draw(reference, rng)))


def score(images: Sequence[Image.Image | Pixels], pairs: Sequence[Pair], judge: Judge) -> Scores:
    """Compare one generated image per pair with what the pair asks for.

    Args:
        images: RGB, 128 x 128, in the order of `pairs`; where they came from does not matter.
    """
    if len(images) != len(pairs) or not pairs:
        raise ValueError(f"{len(images)} images for {len(pairs)} pairs; give one image for each of at least one pair")
    pixels = np.stack([np.asarray(image, dtype=np.uint8) for image in images])
    foreground = [foreground_colour(p) == pair.target.foreground for p, pair in zip(pixels, pairs, strict=True)]
    background = [background_colour(p) == pair.target.background for p, pair in zip(pixels, pairs, strict=True)]
    said = list(zip(judge.shapes_and_textures(pixels), pairs, strict=True))
    return Scores(
        foreground=float(np.mean(foreground)),
        background=float(np.mean(background)),
        both=float(np.mean(np.logical_and(foreground, background))),
        texture=float(np.mean([texture == pair.target.texture for (_, texture), pair in said])),
        shape=float(np.mean([shape == pair.target.shape for (shape, _), pair in said])),
        reference_shape=float(np.mean([shape == pair.reference_scene.shape for (shape, _), pair in said])),
        images=len(pairs),
    )
