"""CLIP preprocessing and the VAE's output against transformers and diffusers."""

from __future__ import annotations

import numpy as np
import pytest
from picture_files import random_picture
from PIL import Image

from ipa.engines.errors import RequestError
from ipa.engines.manifest import ImageProcessorRecord
from ipa.runtime.images import MAX_ASPECT_RATIO, preprocess, to_images

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


SIZES = [
    *[(224, 224), (1, 1), (2, 1), (3, 7), (5, 500), (223, 224), (225, 224), (226, 225), (640, 480), (480, 641)],
    *[(333, 1001), (100, 1), (1, 100), (448, 449), (31, 30), (1024, 768), (299, 300)],
]


@pytest.mark.parametrize("edge", [224, 32, 33])
def test_preprocess_equals_transformers_bit_for_bit(edge: int) -> None:
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    oracle = module.CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})
    processor = ImageProcessorRecord(edge, CLIP_MEAN, CLIP_STD)
    for seed, size in enumerate(SIZES):
        image = random_picture(*size, seed)
        expected = np.stack(oracle(image)["pixel_values"])
        result = preprocess([image], processor)
        assert result.dtype == np.float32 and result.shape == (1, 3, edge, edge)
        np.testing.assert_array_equal(result, expected, err_msg=str(size))


def test_preprocess_stacks_images_in_order() -> None:
    processor = ImageProcessorRecord(32, CLIP_MEAN, CLIP_STD)
    images = [random_picture(40, 50, 1), random_picture(60, 33, 2)]
    both = preprocess(images, processor)
    np.testing.assert_array_equal(both, np.concatenate([preprocess([image], processor) for image in images]))


def test_preprocess_refuses_extreme_aspect_ratios() -> None:
    processor = ImageProcessorRecord(32, CLIP_MEAN, CLIP_STD)
    assert preprocess([Image.new("RGB", (1, MAX_ASPECT_RATIO))], processor).shape == (1, 3, 32, 32)
    for size in ((1, 10_000), (10_000, 1), (1, MAX_ASPECT_RATIO + 1)):
        with pytest.raises(RequestError, match=f"{size[0]} x {size[1]} pixels"):
            preprocess([Image.new("RGB", size)], processor)


def test_to_images_equals_diffusers_byte_for_byte() -> None:
    torch = pytest.importorskip("torch")
    from diffusers.image_processor import VaeImageProcessor

    rng = np.random.default_rng(0)
    array = rng.normal(0, 0.8, (2, 3, 24, 40)).astype(np.float32)
    # Every multiple of half a step, where rounding and clipping decide.
    edges = (np.arange(-20, 531, dtype=np.float32) / 510 * 2 - 1).astype(np.float32)
    array.reshape(-1)[: edges.size] = edges
    expected = VaeImageProcessor().postprocess(torch.from_numpy(array), output_type="pil")
    result = to_images(array)
    assert [image.size for image in result] == [(40, 24)] * 2
    for ours, theirs in zip(result, expected, strict=True):
        assert ours.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
