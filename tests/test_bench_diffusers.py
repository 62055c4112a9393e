"""The baseline draws what our runtime draws: both are asked by the same requests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from controlled import hole, picture
from diffusers import AutoPipelineForText2Image
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil

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
TINY_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 48,  # as the tiny pipeline's feature extractor prepares
    "patch_size": 24,
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


def test_a_pipelines_safety_checker_is_left_out(tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "published"  # as Stable Diffusion 1.5 is published
    shutil.copytree(tiny_base, base)
    index = json.loads((base / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "requires_safety_checker": True,
    }
    (base / "model_index.json").write_text(json.dumps(index))
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=TINY_VISION, projection_dim=8))
    checker.concept_embeds_weights.data.fill_(-10.0)  # below any cosine: every picture is flagged, and becomes black
    checker.save_pretrained(base / "safety_checker")
    published = AutoPipelineForText2Image.from_pretrained(base, local_files_only=True)
    with torch.inference_mode():
        assert not np.asarray(published("a cat", num_inference_steps=1, height=64, width=64).images[0]).any()
    pipe = DiffusersPipeline(base, None)
    start: dict[str, Any] = {"init_image": picture(4, 64, 64), "strength": 0.8}
    for fields in ({"height": 64, "width": 64}, start):
        usual = {"num_inference_steps": 2, "guidance_scale": 1.0, "guidance_rescale": 0.0, "eta": 0.0}
        (image,) = pipe.draw(Request(prompt="a cat", scheduler="ddim", seed=3, **usual, **fields))
        assert np.asarray(image).any()


def test_xl_pictures_are_not_marked(tiny_xl_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def marked(self: object) -> None:
        raise AssertionError("a watermark")

    for name in ("stable_diffusion_xl", "stable_diffusion_xl_img2img"):
        module = import_module(f"diffusers.pipelines.stable_diffusion_xl.pipeline_{name}")
        monkeypatch.setattr(module, "is_invisible_watermark_available", lambda: True)
        monkeypatch.setattr(module, "StableDiffusionXLWatermarker", marked, raising=False)
    theirs = DiffusersPipeline(tiny_xl_base, None)
    assert theirs.pipe.watermark is None
    request = Request(prompt="", init_image=picture(4, 64, 64), seed=3, num_inference_steps=2)
    assert theirs._task(request)[0].watermark is None


def test_an_image_encoder_that_is_named_apart(
    ours: Pipeline, theirs: DiffusersPipeline, tiny_base: Path, tiny_adapter_file: Path, tmp_path: Path
) -> None:
    base, encoder = tmp_path / "base", tmp_path / "encoder"
    shutil.copytree(tiny_base, base)
    (base / "image_encoder").rename(encoder)
    with pytest.raises(IpaError, match="diffusers cannot load"):
        DiffusersPipeline(base, tiny_adapter_file)
    apart = DiffusersPipeline(base, tiny_adapter_file, image_encoder=encoder)
    request = ours.run(request_of(TASKS["variation"], ours)).request
    assert np.array_equal(pixels(apart.draw(request)), pixels(theirs.draw(request)))
    # Preparation: the pipeline's own if the size is right, else CLIP's; Pillow's whatever is installed.
    assert type(apart.pipe.feature_extractor) is CLIPImageProcessorPil
    config = json.loads((base / "feature_extractor" / "preprocessor_config.json").read_text())
    other = {**config, "image_mean": [0.5] * 3, "size": {"shortest_edge": 24}}
    (base / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(other))
    again = DiffusersPipeline(base, tiny_adapter_file, image_encoder=encoder)
    assert np.array_equal(pixels(again.draw(request)), pixels(theirs.draw(request)))
    (encoder / "preprocessor_config.json").write_text(json.dumps({**config, "image_mean": [0.5] * 3}))
    own = DiffusersPipeline(base, tiny_adapter_file, image_encoder=encoder)
    assert own.pipe.feature_extractor.image_mean == (0.5,) * 3
