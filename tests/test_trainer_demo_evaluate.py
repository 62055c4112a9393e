"""The estimators that score generated images must be right about drawn ones."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from ipa.trainer.demo.colours import background_colour, foreground_colour
from ipa.trainer.demo.dataset import Dataset, attributes_of, draw_dataset
from ipa.trainer.demo.evaluate import held_out_pairs, score
from ipa.trainer.demo.judge import Judge, augmented, load_judge, reduced, save_judge, shape_accuracy
from ipa.trainer.demo.shapes import draw


class _KnowsAll(Judge):
    """Answers from a list instead of looking."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def shapes_and_textures(self, images):
        return self.answers


@pytest.mark.parametrize("blur", [0.0, 1.0])
def test_colours_are_read_off_drawn_images(blur):
    dataset = draw_dataset(200, seed=11)
    foreground, background = [], []
    for index in range(200):
        image = np.asarray(Image.fromarray(dataset.images[index]).filter(ImageFilter.GaussianBlur(blur)))
        scene = dataset.scene(index)
        foreground.append(foreground_colour(image) == scene.foreground)
        background.append(background_colour(image) == scene.background)
    assert np.mean(foreground) >= 0.97
    assert np.mean(background) >= 0.99


def test_an_empty_image_has_no_foreground():
    image = np.full((128, 128, 3), (40, 70, 210), np.uint8)
    assert background_colour(image) == "blue"
    assert foreground_colour(image) is None


def test_perfect_images_score_one_and_the_references_have_the_wrong_shape():
    pairs = held_out_pairs(16)
    rng = np.random.default_rng(0)
    ideal = [draw(pair.target, rng) for pair in pairs]
    right = _KnowsAll([(pair.target.shape, pair.target.texture) for pair in pairs])
    scores = score(ideal, pairs, right)
    assert (scores.foreground, scores.background, scores.both) == (1, 1, 1)
    assert (scores.shape, scores.texture, scores.reference_shape, scores.images) == (1, 1, 0, 16)
    copying = _KnowsAll([(pair.reference_scene.shape, "plain") for pair in pairs])
    scores = score([pair.reference for pair in pairs], pairs, copying)
    assert (scores.foreground, scores.shape, scores.reference_shape) == (1, 0, 1)
    assert scores.texture == np.mean([pair.target.texture == "plain" for pair in pairs])


def test_colours_of_other_images_score_low():
    pairs = held_out_pairs(16)
    answers = [(pair.target.shape, pair.target.texture) for pair in pairs]
    shifted = [pair.reference for pair in pairs[1:] + pairs[:1]]
    assert score(shifted, pairs, _KnowsAll(answers)).both < 0.3


def test_the_numbers_of_images_and_pairs_must_agree():
    with pytest.raises(ValueError, match="1 images for 2 pairs"):
        score([np.zeros((128, 128, 3), np.uint8)], held_out_pairs(2), Judge())


def test_a_judge_survives_the_disk(tmp_path):
    torch.manual_seed(0)
    judge = Judge().eval()
    save_judge(judge, tmp_path / "judge.safetensors")
    dataset = draw_dataset(8, seed=1)
    pixels = reduced(dataset.images)
    with torch.no_grad():
        for mine, loaded in zip(judge(pixels), load_judge(tmp_path / "judge.safetensors")(pixels), strict=True):
            assert torch.equal(mine, loaded)


def test_shape_accuracy_counts_right_answers():
    pairs = held_out_pairs(4)
    drawn = Dataset(
        np.stack([draw(pair.target, np.random.default_rng(0)) for pair in pairs]),
        np.array([attributes_of(pair.target) for pair in pairs]),
    )
    answers = [(pair.target.shape, "plain") for pair in pairs[:3]] + [("no shape", "plain")]
    assert shape_accuracy(_KnowsAll(answers), drawn) == 0.75


def test_augmentation_keeps_the_picture():
    pixels = reduced(draw_dataset(8, seed=1).images)
    torch.manual_seed(0)
    changed = augmented(pixels)
    assert changed.shape == pixels.shape and not torch.equal(changed, pixels)
    for before, after in zip(pixels, changed, strict=True):
        assert np.corrcoef(before.flatten(), after.flatten())[0, 1] > 0.8
