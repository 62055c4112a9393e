"""Drawn scenes: the same for the same seed, true to their names, and never a held-out one in training."""

import json

import numpy as np
import pytest
from PIL import Image

from ipa.trainer.demo.colours import background_colour, foreground_colour
from ipa.trainer.demo.dataset import draw_dataset, load_or_draw, write_adapter_data
from ipa.trainer.demo.evaluate import held_out_pairs
from ipa.trainer.demo.shapes import PALETTE, SHAPES, TEXTURES, Scene, all_scenes, caption, describe, draw, other_shape

SCENE = Scene("star", "red", "blue", "striped")


def test_the_same_seed_draws_the_same_image_and_another_seed_another():
    first, again, other = (draw(SCENE, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.shape == (128, 128, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_fills_a_fair_part_of_the_image(shape):
    image = draw(Scene(shape, "black", "white", "plain"), np.random.default_rng(0))
    covered = (image.mean(axis=-1) < 135).mean()
    assert 0.03 < covered < 0.5


def test_shapes_differ_at_the_same_place():
    images = [draw(Scene(shape, "black", "white", "plain"), np.random.default_rng(0)).astype(int) for shape in SHAPES]
    for i, first in enumerate(images):
        for second in images[i + 1 :]:
            assert np.abs(first - second).mean() > 5


@pytest.mark.parametrize("texture", TEXTURES)
def test_the_second_tone_leaves_most_of_the_foreground(texture):
    shares = []
    for seed in range(20):
        image = draw(Scene("square", "red", "white", texture), np.random.default_rng(seed)).astype(float)
        first = np.linalg.norm(image - PALETTE["red"], axis=-1) < 40
        second = np.linalg.norm(image - np.array(PALETTE["red"]) / 2, axis=-1) < 40
        shares.append(second.sum() / (first.sum() + second.sum()))
    assert np.mean(shares) == 0 if texture == "plain" else 0.25 < np.mean(shares) < 0.45


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no shape is called 'cube'"):
        draw(Scene("cube", "red", "blue", "plain"), np.random.default_rng(0))
    with pytest.raises(ValueError, match="no texture is called 'furry'"):
        draw(Scene("star", "red", "blue", "furry"), np.random.default_rng(0))


def test_captions_name_what_is_asked_for():
    assert describe(SCENE, texture=True, foreground=True, background=True) == "a striped red star on a blue background"
    assert describe(SCENE, texture=False, foreground=False, background=False) == "a star"
    rng = np.random.default_rng(0)
    captions = [caption(SCENE, rng) for _ in range(400)]
    assert all("star" in text.split() for text in captions)
    for word, probability in (("striped", 0.15), ("red", 0.15), ("blue", 0.15)):
        share = np.mean([word in text.split() for text in captions])
        assert abs(share - probability) < 0.08  # more than four standard deviations of 400 coin throws


def test_about_a_tenth_of_the_combinations_is_held_out_and_training_never_draws_one():
    scenes = list(all_scenes())
    assert len(scenes) == 8 * 8 * 7 * 3
    assert 0.05 < np.mean([scene.is_held_out for scene in scenes]) < 0.15
    dataset = draw_dataset(300, seed=9)
    assert not any(dataset.scene(index).is_held_out for index in range(300))


def test_a_reference_shares_all_but_the_shape():
    rng = np.random.default_rng(0)
    for _ in range(50):
        other = other_shape(SCENE, rng)
        assert other.shape != SCENE.shape and not other.is_held_out
        assert (other.foreground, other.background, other.texture) == ("red", "blue", "striped")


def test_the_dataset_on_disk_is_the_one_drawn(tmp_path):
    drawn = draw_dataset(20, seed=1)
    first, again = load_or_draw(tmp_path, 20), load_or_draw(tmp_path, 20)
    for stored in (first, again):
        assert np.array_equal(stored.images, drawn.images)
        assert np.array_equal(stored.attributes, drawn.attributes)
    assert len(load_or_draw(tmp_path, 10)) == 10


def test_two_processes_draw_what_one_does():
    one, two = draw_dataset(260, seed=4), draw_dataset(260, seed=4, workers=2)
    assert np.array_equal(one.images, two.images)


def test_adapter_records_name_files_that_share_their_colours(tmp_path):
    listing = write_adapter_data(tmp_path, 12)
    records = [json.loads(line) for line in listing.read_text().splitlines()]
    assert len(records) == 12
    for record in records:
        target, reference = (np.asarray(Image.open(tmp_path / record[key])) for key in ("image_file", "reference_file"))
        assert record["text"].startswith("a ")
        assert foreground_colour(target) == foreground_colour(reference)
        assert background_colour(target) == background_colour(reference)


def test_the_evaluation_pairs_are_held_out_and_fixed():
    pairs, again = held_out_pairs(), held_out_pairs()
    assert len(pairs) == 64 and len({pair.target for pair in pairs}) == 64
    for pair, same in zip(pairs, again, strict=True):
        assert pair.target.is_held_out
        assert pair.prompt == f"a {pair.target.shape}"
        assert pair.reference_scene.shape != pair.target.shape
        assert pair.reference.tobytes() == same.reference.tobytes()
