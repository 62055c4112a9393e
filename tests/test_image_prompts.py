"""Several images, several adapters, masks, scales by block and over the steps, against diffusers in FP32.

One UNet with three slots and masks serves all of it. Tolerances as in test_fidelity.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import made_once
from diffusers import DDIMScheduler, StableDiffusionPipeline
from image_prompt_oracle import SIDE, STEPS, ours, preprocessed, theirs
from parity import assert_same_latents
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import save
from safetensors.torch import save_file as save_torch_file
from tiny import EMBED_WIDTH, tiny_adapter

from ipa.engines.errors import IpaError, RequestError
from ipa.engines.spec import ImageSlots
from ipa.export.adapters import AdapterFile
from ipa.export.build import ExportRequest, export_bundle
from ipa.runtime import ImagePrompt, Pipeline
from ipa.runtime.image_embeds import write_embeds

BLOCKS = {"down": {"block_2": [0.0, 1.2]}, "mid": 0.4, "up": {"block_1": [0.3, 1.0, 0.0], "block_3": 0.5}}


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (6, 9, 3), dtype=np.uint8)).resize((90, 60))


def half_mask(left: bool, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    mask = np.zeros((size[1], size[0], 3), np.uint8)
    half = size[0] // 2
    mask[:, slice(0, half) if left else slice(half, None)] = 255
    return Image.fromarray(mask)


@pytest.fixture(scope="module")
def second_adapter(session_folder: Path, tiny_base: Path) -> Path:
    config = json.loads((tiny_base / "unet" / "config.json").read_text())
    return made_once(session_folder, "tiny_second.safetensors", lambda file: tiny_adapter(config, file, seed=5))


@pytest.fixture(scope="module")
def roomy_bundle(session_folder: Path, tiny_base: Path, tiny_adapter_file: Path, second_adapter: Path) -> Path:
    """Adapters `a` and `b`, three slots with masks."""
    files = AdapterFile("a", tiny_adapter_file), AdapterFile("b", second_adapter)

    def make(output: Path) -> None:
        export_bundle(ExportRequest(str(tiny_base), output, adapters=files, slots=ImageSlots(3, True)))

    return made_once(session_folder, "roomy_bundle", make)


@pytest.fixture(scope="module")
def pipeline(roomy_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(roomy_bundle, engine="onnxruntime") as pipe:
        yield pipe


@pytest.fixture(scope="module")
def oracle(tiny_base: Path, tiny_adapter_file: Path, second_adapter: Path) -> Any:
    """diffusers with both adapters, in the order a, b."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True)
    files = [tiny_adapter_file, second_adapter]
    pipe.load_ip_adapter(
        [str(file.parent) for file in files],
        subfolder=["", ""],
        weight_name=[file.name for file in files],
        image_encoder_folder=None,
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_two_adapters_with_several_images(pipeline: Pipeline, oracle: Any) -> None:
    found = ours(
        pipeline, ImagePrompt((picture(1), picture(2)), "a", 0.8), ImagePrompt((picture(3),), "b", 0.3), images=2
    )
    assert_same_latents(found, theirs(oracle, [[picture(1), picture(2)], [picture(3)]], [0.8, 0.3], count=2))


def test_scales_by_block(pipeline: Pipeline, oracle: Any) -> None:
    found = ours(pipeline, ImagePrompt((picture(1),), "a", BLOCKS), ImagePrompt((picture(3),), "b", 0.6))
    assert_same_latents(found, theirs(oracle, [picture(1), picture(3)], [BLOCKS, 0.6]))


@pytest.mark.parametrize("size", [(64, 64), (104, 72)])
def test_masks(pipeline: Pipeline, oracle: Any, size: tuple[int, int]) -> None:
    left, right, tall = half_mask(True, size), half_mask(False, size), half_mask(True, size).transpose(1)
    found = ours(
        pipeline,
        ImagePrompt((picture(1), picture(2)), "a", 0.9, masks=(left, right)),
        ImagePrompt((picture(3),), "b", 0.5, masks=(tall,)),
        size=size,
    )
    masks = [preprocessed([left, right], size), preprocessed([tall], size)]
    assert_same_latents(
        found, theirs(oracle, [[picture(1), picture(2)], [picture(3)]], [[0.9, 0.9], [0.5]], masks, size)
    )


def test_an_image_counts_in_its_share_of_the_steps(pipeline: Pipeline, oracle: Any) -> None:
    def switch(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        active = (index + 1) / STEPS >= 0.25 and (index + 2) / STEPS <= 0.75
        pipe.set_ip_adapter_scale([0.8 if active else 0.0, 0.4])
        return tensors

    found = ours(
        pipeline, ImagePrompt((picture(1),), "a", 0.8, start=0.25, end=0.75), ImagePrompt((picture(3),), "b", 0.4)
    )
    expected = theirs(oracle, [picture(1), picture(3)], [0.0, 0.4], callback=switch)
    assert_same_latents(found, expected)


# Below, the same sums in another order: some 1e-7 per call, over steps and guidance 1e-5.


def test_the_order_of_images_does_not_matter(pipeline: Pipeline) -> None:
    one, other = ((picture(1), picture(2), picture(3)), (picture(3), picture(1), picture(2)))
    np.testing.assert_allclose(
        ours(pipeline, ImagePrompt(one, "a")), ours(pipeline, ImagePrompt(other, "a")), rtol=1e-4, atol=1e-4
    )


def test_masks_that_sum_to_one_are_no_mask(pipeline: Pipeline) -> None:
    masked = ImagePrompt((picture(1), picture(1)), "a", masks=(half_mask(True), half_mask(False)))
    np.testing.assert_allclose(
        ours(pipeline, masked), ours(pipeline, ImagePrompt((picture(1),), "a")), rtol=1e-4, atol=1e-4
    )


def test_an_adapter_at_0_is_not_there(pipeline: Pipeline) -> None:
    both = ours(pipeline, ImagePrompt((picture(1),), "a", 0.7), ImagePrompt((picture(2),), "b", 0.0))
    np.testing.assert_array_equal(both, ours(pipeline, ImagePrompt((picture(1),), "a", 0.7)))


def test_unused_slots_leave_the_base_model(pipeline: Pipeline, tiny_bundle: Path) -> None:
    with Pipeline.open(tiny_bundle, engine="onnxruntime") as plain:
        np.testing.assert_array_equal(ours(pipeline), ours(plain))


def test_loading_again_gives_the_same_bits(pipeline: Pipeline, roomy_bundle: Path) -> None:
    prompts = ImagePrompt((picture(1),), "a"), ImagePrompt((picture(2),), "b")
    with Pipeline.open(roomy_bundle, engine="onnxruntime") as again:
        np.testing.assert_array_equal(ours(pipeline, *prompts), ours(again, *prompts))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"masks": (half_mask(True),) * 2}, "2 masks for 1 images"),
        ({"masks": (half_mask(True, (64, 32)),)}, "64x32.*same ratio"),
        ({"adapter": "c"}, "no adapter 'c'"),
        ({"scale": {"up": {"block_0": 1.0}}}, "up.block_0, this UNet has attention in down.block_0"),
        ({"scale": {"sideways": 1.0}}, "'sideways'"),
        ({"scale": {"up": {"block_1": [1.0, 2.0]}}}, "a list of 3"),
        ({"scale": "style"}, "Stable Diffusion XL"),
        ({"scale": "loud"}, "no preset"),
        ({"scale": float("nan")}, "finite"),
        ({"start": 0.7, "end": 0.2}, "less than the end"),
        ({"end": 1.5}, "from 0 to 1"),
        ({"images": ()}, "no image"),
    ],
)
def test_bad_image_prompts(pipeline: Pipeline, prompt: dict[str, Any], message: str) -> None:
    with pytest.raises(IpaError, match=message):
        ours(pipeline, ImagePrompt(**{"images": (picture(1),), "adapter": "a", **prompt}))


def test_more_prompts_than_slots(pipeline: Pipeline, tiny_bundle: Path) -> None:
    with pytest.raises(RequestError, match=r"4 image slots, .* has 3: .*--image-slots 4 --masks"):
        ours(pipeline, *[ImagePrompt((picture(1),), "a")] * 4)
    with Pipeline.open(tiny_bundle) as plain, pytest.raises(RequestError, match=r"has 1 and no masks: .* --masks"):
        ours(plain, ImagePrompt((picture(1),), "tiny", masks=(half_mask(True),)))


def test_saved_embeds_stand_for_their_images(pipeline: Pipeline, tmp_path: Path) -> None:
    prompt = ImagePrompt((picture(1), picture(2)), "a", 0.8, masks=(half_mask(True), half_mask(False)))
    file = tmp_path / "two.safetensors"
    write_embeds(file, pipeline.image_embeds(prompt), "image_embeds", pipeline.bundle)
    saved = replace(prompt, images=(), embeds=file)
    np.testing.assert_array_equal(ours(pipeline, saved), ours(pipeline, prompt))
    np.testing.assert_array_equal(pipeline.image_embeds(saved), pipeline.image_embeds(prompt))
    with pytest.raises(RequestError, match="1 masks for 2 images of adapter 'a'"):
        ours(pipeline, replace(saved, masks=(half_mask(True),)))
    with pytest.raises(RequestError, match="images and embeds"):
        replace(prompt, embeds=file)


def test_embeds_are_diffusers_own(pipeline: Pipeline, oracle: Any, tmp_path: Path) -> None:
    """A file of diffusers' embeddings, without our metadata, gives diffusers' picture."""
    file = tmp_path / "theirs.safetensors"
    with torch.no_grad():
        embeds = oracle.prepare_ip_adapter_image_embeds([[picture(1), picture(2)], picture(3)], None, "cpu", 1, True)
    unread = torch.zeros(3).to(torch.float8_e4m3fn)  # which numpy has not
    save_torch_file({"image_embeds": embeds[0].contiguous(), "unread": unread}, file)
    found = ours(pipeline, ImagePrompt(adapter="a", scale=0.8, embeds=file), ImagePrompt((picture(3),), "b", 0.3))
    assert_same_latents(found, theirs(oracle, [[picture(1), picture(2)], picture(3)], [0.8, 0.3]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"no tensors", "cannot be read"),
        ({"image_embeds": np.zeros((2, 1, 7), np.float32)}, r"hold image_embeds F32\(2, 1, 7\); the adapter reads"),
        ({"hidden_states": np.zeros((2, 1, 4, 4), np.float32)}, "the adapter reads image_embeds"),
        ({"image_embeds": np.full((2, 1, EMBED_WIDTH), np.nan, np.float32)}, "NaN"),
        ({"image_embeds": np.zeros((1, 1, EMBED_WIDTH), np.float32)}, "the adapter reads"),
        ({"image_embeds": np.zeros((2, 65, EMBED_WIDTH), np.float32)}, "at most 64 images"),
        (b"", "the file is empty"),
        (save({"image_embeds": torch.zeros(2, 1, EMBED_WIDTH, dtype=torch.bfloat16)}), r"BF16.*in F16, F32, F64"),
        (save({"image_embeds": torch.zeros(2, 1, EMBED_WIDTH).to(torch.float8_e4m3fn)}), r"F8_E4M3.*in F16, F32, F64"),
    ],
)
def test_bad_embeds(pipeline: Pipeline, tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "bad.safetensors"
    if isinstance(content, dict):
        save_file(content, file)
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(RequestError, match=message):
        ours(pipeline, ImagePrompt(adapter="a", embeds=file))


def test_embeds_of_another_image_encoder(pipeline: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    embeds = np.zeros((2, 1, EMBED_WIDTH), np.float32)
    save_file({"image_embeds": embeds}, file, metadata={"image_encoder_sha256": "0" * 64})
    with pytest.raises(RequestError, match="another image encoder"):
        ours(pipeline, ImagePrompt(adapter="a", embeds=file))


def test_the_command_saves_and_takes_embeds(roomy_bundle: Path, tmp_path: Path) -> None:
    picture(1).save(tmp_path / "in.png")
    common = ["--bundle", roomy_bundle, "--adapter", "b=0.7", "--prompt", "a cat", "--steps", 2, "--seed", 1]
    common += ["--height", 64, "--width", 64, "--engine", "onnxruntime", "--no-metadata"]
    first, second, file = (tmp_path / name for name in ("1.png", "2.png", "kept.safetensors"))
    run = Path(sys.executable).parent / "ipa-run"
    for extra in (
        ["--image", tmp_path / "in.png", "--save-image-embeds", file, "--output", first],
        ["--image-embeds", file, "--output", second],
    ):
        done = subprocess.run([run, *map(str, common + extra)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    assert first.read_bytes() == second.read_bytes()
