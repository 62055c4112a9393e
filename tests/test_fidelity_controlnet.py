"""ControlNets against diffusers' own pipelines, with and without an adapter.

Tolerances as in test_fidelity.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import made_once
from controlled import EDGES, IMAGE, MOOD, POSE, Oracle, hole, last_latents, make_request, picture
from diffusers import UNet2DConditionModel
from diffusers.image_processor import IPAdapterMaskProcessor
from parity import assert_same_latents

from ipa.engines.spec import ImageSlots
from ipa.export.adapters import AdapterFile
from ipa.export.build import ExportRequest, export_bundle
from ipa.export.controlnets import ControlNetSource
from ipa.runtime import ControlImage, ImagePrompt, Pipeline, Request

FAMILIES = ("sd15", "sdxl")
ADAPTERS = {"sd15": "tiny", "sdxl": "base"}
Pair = tuple[Pipeline, Oracle]  # both of one family


@pytest.fixture(scope="module")
def sd15(
    tiny_control_bundle: Path, tiny_base: Path, tiny_adapter_file: Path, tiny_controlnets: dict[str, Path]
) -> Iterator[Pair]:
    with Pipeline.open(tiny_control_bundle, engine="onnxruntime") as pipe:
        yield pipe, Oracle("sd15", tiny_base, tiny_adapter_file, tiny_controlnets)


@pytest.fixture(scope="module")
def sdxl(
    tiny_xl_bundle: Path, tiny_xl_base: Path, tiny_xl_files: dict[str, Path], tiny_xl_controlnets: dict[str, Path]
) -> Iterator[Pair]:
    with Pipeline.open(tiny_xl_bundle, engine="onnxruntime") as pipe:
        yield pipe, Oracle("sdxl", tiny_xl_base, tiny_xl_files["base"], tiny_xl_controlnets)


def make_family_request(family: str, *controls: ControlImage, **fields: Any) -> Request:
    """With the adapter named, of which the bundle of SDXL has two."""
    return make_request(*controls, **fields, **({"adapter": ADAPTERS[family]} if "image" in fields else {}))


CASES: dict[str, tuple[tuple[ControlImage, ...], dict[str, Any]]] = {
    "one": ((EDGES,), {}),
    "one, no guidance": ((EDGES,), {"guidance_scale": 1.0}),
    "one, adapter, two pictures": ((EDGES,), {**IMAGE, "num_images": 2}),
    "one, not square, adapter": ((POSE,), {**IMAGE, "height": 72, "width": 104}),
    "two": ((EDGES, POSE), {}),
    "two, adapter, not square, two pictures": ((EDGES, POSE), {**IMAGE, "height": 104, "width": 72, "num_images": 2}),
    "two, no guidance": ((EDGES, POSE), {"guidance_scale": 1.0}),
    "one in some steps": ((ControlImage(picture(1), "edges", 1.2, 0.25, 0.75),), {}),
    "two in other steps": (
        (ControlImage(picture(1), "edges", start=0.3), ControlImage(picture(2), "pose", 0.8, end=0.6)),
        IMAGE,
    ),
    "guess mode": ((EDGES,), {"guess_mode": True}),
    "guess mode, two, adapter": ((EDGES, POSE), {**IMAGE, "guess_mode": True, "num_images": 2}),
    "guess mode, no guidance": ((POSE,), {"guess_mode": True, "guidance_scale": 1.0}),
    "without place": ((MOOD,), {"height": 72, "width": 104}),
    "without place, guess mode": ((MOOD,), {"guess_mode": True}),
    "without place, another after it": ((MOOD, EDGES), {}),
    "without place, after another": ((EDGES, MOOD), {}),
    "pndm": ((EDGES,), {"scheduler": "pndm"}),
    "scaled latents": ((EDGES,), {**IMAGE, "scheduler": "euler"}),
}
SDXL_SIZES = {"original_size": (96, 200), "crops_coords_top_left": (8, 24), "target_size": (128, 72)}
SDXL_CASES = {
    "no negative prompt, sizes": ((EDGES,), {"negative_prompt": "", "scheduler": "euler", **SDXL_SIZES}),
    "guess mode, sizes": ((EDGES,), {"negative_prompt": "", "guess_mode": True, **SDXL_SIZES}),
    **{
        name: CASES[name]
        for name in (
            "one, no guidance",
            "one, not square, adapter",
            "two, adapter, not square, two pictures",
            "two in other steps",
            "guess mode, two, adapter",
            "without place",
        )
    },
}


@pytest.mark.parametrize(
    ("family", "case"), [*(("sd15", case) for case in CASES), *(("sdxl", case) for case in SDXL_CASES)]
)
def test_latents_equal_diffusers(request: pytest.FixtureRequest, family: str, case: str) -> None:
    pipeline, oracle = request.getfixturevalue(family)
    controls, fields = (CASES if family == "sd15" else SDXL_CASES)[case]
    asked = make_family_request(family, *controls, **fields)
    found = last_latents(pipeline, asked)
    assert_same_latents(found, oracle(asked))
    without = last_latents(pipeline, replace(asked, controls=(), guess_mode=False))
    assert np.abs(found - without).max() > 0.05 * np.abs(without).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_image_to_image(request: pytest.FixtureRequest, family: str) -> None:
    """Where the run begins late, start and end count the steps that are left."""
    pipeline, oracle = request.getfixturevalue(family)
    half = ControlImage(picture(1), "edges", start=0.0, end=0.7)
    begin = {"init_image": picture(4), "strength": 0.6, "num_inference_steps": 6}
    asked = make_family_request(family, half, **begin, **IMAGE)
    assert_same_latents(last_latents(pipeline, asked), oracle(asked))


@pytest.mark.parametrize("family", FAMILIES)
def test_inpainting(request: pytest.FixtureRequest, family: str) -> None:
    pipeline, oracle = request.getfixturevalue(family)
    begin = {"init_image": picture(4, 64, 64), "mask_image": hole(), "strength": 0.8}
    asked = make_family_request(family, EDGES, **begin, **IMAGE)
    assert_same_latents(last_latents(pipeline, asked), oracle(asked))


def test_an_inpainting_model(session_folder: Path, sd15: Pair) -> None:
    """Its ControlNet takes the latents alone, not the mask and the masked picture."""
    oracle = sd15[1]

    def make_base(folder: Path) -> None:
        shutil.copytree(oracle.base, folder)
        config = json.loads((folder / "unet" / "config.json").read_text())
        torch.manual_seed(4)
        UNet2DConditionModel.from_config({**config, "in_channels": 9}).save_pretrained(folder / "unet")

    base = made_once(session_folder, "tiny_controlled_inpainting", make_base)
    controlnets = (ControlNetSource("edges", str(oracle.controlnets["edges"])),)
    bundle = made_once(
        session_folder,
        "tiny_controlled_inpainting_bundle",
        lambda output: export_bundle(ExportRequest(str(base), output, controlnets=controlnets)),
    )
    begin = {"init_image": picture(4, 64, 64), "mask_image": hole(), "strength": 1.0, "num_images": 2}
    expected = Oracle("sd15", base, oracle.adapter, oracle.controlnets)(make_request(EDGES, **begin))
    with Pipeline.open(bundle, engine="onnxruntime") as pipe:
        assert_same_latents(last_latents(pipe, make_request(replace(EDGES, name=None), **begin)), expected)


def test_masks_of_image_prompts(session_folder: Path, sd15: Pair) -> None:
    """The UNet with all its inputs: two slots, masks and residuals."""
    oracle = sd15[1]
    given = ExportRequest(
        str(oracle.base),
        Path(),
        adapters=(AdapterFile("tiny", oracle.adapter),),
        slots=ImageSlots(2, has_masks=True),
        controlnets=(ControlNetSource("edges", str(oracle.controlnets["edges"])),),
    )
    bundle = made_once(
        session_folder, "tiny_masked_control_bundle", lambda output: export_bundle(replace(given, output=output))
    )
    mask = IPAdapterMaskProcessor().preprocess([hole()], height=64, width=64).reshape(1, 1, 64, 64)
    expected = oracle(make_request(EDGES, **IMAGE), cross_attention_kwargs={"ip_adapter_masks": [mask]})
    prompt = ImagePrompt((picture(9),), scale=0.7, masks=(hole(),))
    with Pipeline.open(bundle, engine="onnxruntime") as pipe:
        assert_same_latents(last_latents(pipe, make_request(EDGES, image_prompts=(prompt,))), expected)
