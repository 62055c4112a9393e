"""The baseline draws what our runtime draws: both are asked by the same requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from controlled import hole, picture
from PIL import Image

from ipa.benchmarks.diffusers_pipeline import DiffusersPipeline
from ipa.engines.errors import IpaError
from ipa.runtime import Pipeline, Request

TASKS: dict[str, dict[str, Any]] = {
    "variation": {"image": picture(9), "ip_adapter_scale": 0.7, "height": 64, "width": 72},
    "several pictures": {"image": picture(9), "num_images": 2},
    "without image prompt": {"scheduler": "dpm++-2m-karras"},
    "image to image": {"image": picture(9), "init_image": picture(4, 64, 64), "scheduler": "euler", "strength": 0.7},
    "inpainting": {"image": picture(9), "init_image": picture(4, 64, 64), "mask_image": hole()},
}


@pytest.fixture(scope="module")
def ours(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_bundle, engine="onnxruntime") as pipe:
        yield pipe


@pytest.fixture(scope="module")
def theirs(tiny_base: Path, tiny_adapter_file: Path) -> DiffusersPipeline:
    return DiffusersPipeline(tiny_base, tiny_adapter_file)


def request_of(fields: dict[str, Any], pipe: Pipeline) -> Request:
    sizes = {} if "init_image" in fields else {"height": 64, "width": 64}
    usual = {"prompt": "a cat", "num_inference_steps": 4, "guidance_scale": 4.0, "scheduler": "ddim", "seed": 3}
    return Request(**{**sizes, **usual, **fields})


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, np.int16) for image in images])


@pytest.mark.parametrize("task", TASKS)
def test_same_pictures(task: str, ours: Pipeline, theirs: DiffusersPipeline) -> None:
    result = ours.run(request_of(TASKS[task], ours))
    expected = theirs.draw(result.request)
    assert np.abs(pixels(result.images) - pixels(expected)).max() <= 2  # neighbours in rounding, as in test_fidelity


def test_steps_are_told(ours: Pipeline, theirs: DiffusersPipeline) -> None:
    request = ours.run(request_of(TASKS["variation"], ours)).request
    done: list[int] = []
    theirs.call(request, done.append, output_type="latent")
    assert done == [0, 1, 2, 3]


def test_what_a_pipeline_does_not_have_is_refused(ours: Pipeline, theirs: DiffusersPipeline) -> None:
    request = ours.run(request_of({**TASKS["image to image"], "guidance_rescale": 0.5}, ours)).request
    with pytest.raises(IpaError, match="StableDiffusionImg2ImgPipeline of diffusers takes no guidance_rescale"):
        theirs.draw(request)


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(IpaError, match=f"diffusers cannot load {tmp_path}"):
        DiffusersPipeline(tmp_path, None)
