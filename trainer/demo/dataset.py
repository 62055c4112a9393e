"""The drawn training set: images and attributes in two arrays on disk, read by every stage."""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ipa.trainer.demo.shapes import (
    COLOURS,
    IMAGE_SIZE,
    SHAPES,
    TEXTURES,
    Pixels,
    Scene,
    caption,
    draw,
    other_shape,
    training_scene,
)
from ipa.trainer.files import atomic_path

TRAINING_SEED, JUDGE_SEED, EVALUATION_SEED = 1, 2, 3  # disjoint streams of random numbers
CHUNK = 250


@dataclass(frozen=True)
class Dataset:
    """Drawn images with what they show.

    Attributes:
        images: (count, 128, 128, 3) uint8.
        attributes: (count, 4) int64, indices of shape, foreground, background and texture.
    """

    images: Pixels
    attributes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.images)

    def scene(self, index: int) -> Scene:
        """What image `index` shows."""
        shape, foreground, background, texture = self.attributes[index]
        return Scene(SHAPES[shape], COLOURS[foreground], COLOURS[background], TEXTURES[texture])


def attributes_of(scene: Scene) -> tuple[int, int, int, int]:
    """Indices of shape, foreground, background and texture."""
    return (
        SHAPES.index(scene.shape),
        COLOURS.index(scene.foreground),
        COLOURS.index(scene.background),
        TEXTURES.index(scene.texture),
    )


def draw_dataset(count: int, seed: int, workers: int = 1) -> Dataset:
    """`count` training scenes; image i depends on the seed and i alone."""
    spans = [(seed, start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        drawn = pool.map(_draw_span, spans) if workers > 1 else map(_draw_span, spans)
        parts = list(tqdm(drawn, total=len(spans), desc=f"drawing {count} images", unit="chunk"))
    return Dataset(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _draw_span(span: tuple[int, int, int]) -> tuple[Pixels, NDArray[np.int64]]:
    seed, start, stop = span
    images = np.empty((stop - start, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    attributes = np.empty((stop - start, 4), np.int64)
    for row, index in enumerate(range(start, stop)):
        rng = np.random.default_rng((seed, index))
        scene = training_scene(rng)
        images[row], attributes[row] = draw(scene, rng), attributes_of(scene)
    return images, attributes


def load_or_draw(folder: Path, count: int, workers: int = 1) -> Dataset:
    """The training set in `folder`, memory-mapped; drawn first if it is not there or of another size."""
    images, attributes = folder / "images.npy", folder / "attributes.npy"
    if not attributes.exists() or len(np.load(attributes, mmap_mode="r")) != count:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = draw_dataset(count, TRAINING_SEED, workers)
        for path, array in ((images, drawn.images), (attributes, drawn.attributes)):
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.save(file, array)
    return Dataset(np.load(images, mmap_mode="r"), np.load(attributes))


def write_adapter_data(folder: Path, count: int) -> Path:
    """Write `count` pairs for `ipa-train adapter` and return the JSONL file that lists them.

    A record's reference shares colours and texture with its target and has any other shape: that
    leaves the shape to the text. Paths are relative to `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for index in tqdm(range(count), desc="adapter pairs", unit="pair"):
        rng = np.random.default_rng((TRAINING_SEED, 1, index))
        target = training_scene(rng)
        reference = other_shape(target, rng)
        names = f"target-{index:05d}.png", f"reference-{index:05d}.png"
        for name, scene in zip(names, (target, reference), strict=True):
            Image.fromarray(draw(scene, rng)).save(folder / name, compress_level=1)
        records.append({"image_file": names[0], "text": caption(target, rng), "reference_file": names[1]})
    listing = folder / "pairs.jsonl"
    with atomic_path(listing) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    return listing
