"""ControlNets against diffusers' own pipelines, with and without an adapter.

Tolerances as in test_fidelity.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import made_once
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image

from ipa.engines.errors import IpaError, RequestError
from ipa.engines.spec import ImageSlots
from ipa.export.adapters import AdapterFile
from ipa.export.build import ExportRequest, export_bundle
from ipa.export.controlnets import ControlNetSource
from ipa.runtime import ControlImage, ImagePrompt, Pipeline, Request

SCHEDULERS = {"ddim": DDIMScheduler, "pndm": PNDMScheduler, "euler": EulerDiscreteScheduler}


def picture(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BILINEAR)


EDGES, POSE = ControlImage(picture(1), "edges"), ControlImage(picture(2), "pose", scale=0.6)
MOOD = ControlImage(picture(3), "mood")


@pytest.fixture(scope="module")
def pipeline(tiny_control_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_control_bundle, engine="onnxruntime") as pipe:
        yield pipe


@pytest.fixture(scope="module")
def models(tiny_controlnets: dict[str, Path]) -> dict[str, Any]:
    return {
        name: ControlNetModel.from_pretrained(folder, local_files_only=True)
        for name, folder in tiny_controlnets.items()
    }


def make_request(*controls: ControlImage, **fields: Any) -> Request:
    defaults: dict[str, Any] = {
        "prompt": "a photo of a cat",
        "negative_prompt": "red dog",
        "controls": controls,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "height": 64,
        "width": 64,
        "scheduler": "ddim",
        "seed": 3,
    }
    return Request(**{**defaults, **fields})


def run_diffusers(
    models: dict[str, Any],
    base: Path,
    adapter: Path,
    request: Request,
    kind: Any = StableDiffusionControlNetPipeline,
    **fields: Any,
) -> Any:
    """The final latents."""
    nets = [models[str(control.name)] for control in request.controls]
    one = len(nets) == 1

    def each(values: Sequence[Any]) -> Any:
        return values[0] if one else list(values)

    pipe = kind.from_pretrained(base, controlnet=each(nets), local_files_only=True, safety_checker=None)
    if request.image is not None:
        pipe.load_ip_adapter(str(adapter.parent), subfolder="", weight_name=adapter.name, image_encoder_folder=None)
        pipe.set_ip_adapter_scale(request.ip_adapter_scale)
        fields["ip_adapter_image"] = request.image
    pipe.scheduler = SCHEDULERS[str(request.scheduler)].from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pictures = each([control.image for control in request.controls])
    places = {"image": pictures} if "image" not in fields else {"control_image": pictures}
    return pipe(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        controlnet_conditioning_scale=each([control.scale for control in request.controls]),
        control_guidance_start=[control.start for control in request.controls],
        control_guidance_end=[control.end for control in request.controls],
        guess_mode=request.guess_mode,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        num_images_per_prompt=request.num_images,
        height=request.height,
        width=request.width,
        generator=torch.Generator().manual_seed(int(request.seed or 0)),
        output_type="latent",
        **places,
        **fields,
    ).images.numpy()


def last_latents(pipeline: Pipeline, request: Request) -> Any:
    *_, step = pipeline.steps(request)
    return step.latents


def assert_close(found: Any, expected: Any, tolerance: float = 1e-3) -> None:
    assert found.shape == expected.shape
    error = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"relative error {error:.1e}")
    assert error < tolerance, f"relative error {error:.1e}"


IMAGE = {"image": picture(9), "ip_adapter_scale": 0.7}
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
    "pndm": ((EDGES,), {"scheduler": "pndm"}),
    "scaled latents": ((EDGES,), {**IMAGE, "scheduler": "euler"}),
}


@pytest.mark.parametrize("case", CASES)
def test_latents_equal_diffusers(
    pipeline: Pipeline, models: dict[str, Any], tiny_base: Path, tiny_adapter_file: Path, case: str
) -> None:
    controls, fields = CASES[case]
    request = make_request(*controls, **fields)
    found = last_latents(pipeline, request)
    assert_close(found, run_diffusers(models, tiny_base, tiny_adapter_file, request))
    without = last_latents(pipeline, make_request(**{**fields, "guess_mode": False}))
    assert np.abs(found - without).max() > 0.05 * np.abs(without).max()


def test_image_to_image(pipeline: Pipeline, models: dict[str, Any], tiny_base: Path, tiny_adapter_file: Path) -> None:
    """Where the run begins late, start and end count the steps that are left."""
    half = ControlImage(picture(1), "edges", start=0.0, end=0.7)
    request = make_request(half, init_image=picture(4), strength=0.6, num_inference_steps=6, **IMAGE)
    kind = StableDiffusionControlNetImg2ImgPipeline
    begin = {"image": request.init_image, "strength": request.strength}
    assert_close(
        last_latents(pipeline, request),
        run_diffusers(models, tiny_base, tiny_adapter_file, request, kind, **begin),
    )


def hole() -> Image.Image:
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[10:50, 20:60] = 255
    return Image.fromarray(mask)


def test_inpainting(pipeline: Pipeline, models: dict[str, Any], tiny_base: Path, tiny_adapter_file: Path) -> None:
    request = make_request(EDGES, init_image=picture(4, 64, 64), mask_image=hole(), strength=0.8, **IMAGE)
    kind = StableDiffusionControlNetInpaintPipeline
    begin = {"image": request.init_image, "mask_image": hole(), "strength": request.strength}
    assert_close(
        last_latents(pipeline, request),
        run_diffusers(models, tiny_base, tiny_adapter_file, request, kind, **begin),
    )


def test_an_inpainting_model(
    session_folder: Path,
    models: dict[str, Any],
    tiny_base: Path,
    tiny_controlnets: dict[str, Path],
    tiny_adapter_file: Path,
) -> None:
    """Its ControlNet takes the latents alone, not the mask and the masked picture."""

    def make_base(folder: Path) -> None:
        shutil.copytree(tiny_base, folder)
        config = json.loads((folder / "unet" / "config.json").read_text())
        torch.manual_seed(4)
        UNet2DConditionModel.from_config({**config, "in_channels": 9}).save_pretrained(folder / "unet")

    base = made_once(session_folder, "tiny_controlled_inpainting", make_base)
    controlnets = (ControlNetSource("edges", str(tiny_controlnets["edges"])),)
    bundle = made_once(
        session_folder,
        "tiny_controlled_inpainting_bundle",
        lambda output: export_bundle(ExportRequest(str(base), output, controlnets=controlnets)),
    )
    request = make_request(
        ControlImage(picture(1)), init_image=picture(4, 64, 64), mask_image=hole(), strength=1.0, num_images=2
    )
    begin = {"image": request.init_image, "mask_image": hole(), "strength": 1.0}
    kind = StableDiffusionControlNetInpaintPipeline
    named = make_request(EDGES, num_images=2)
    expected = run_diffusers(models, base, tiny_adapter_file, named, kind, **begin)
    with Pipeline.open(bundle, engine="onnxruntime") as pipe:
        assert_close(last_latents(pipe, request), expected)


def test_masks_of_image_prompts(
    session_folder: Path,
    models: dict[str, Any],
    tiny_base: Path,
    tiny_adapter_file: Path,
    tiny_controlnets: dict[str, Path],
) -> None:
    """The UNet with all its inputs: two slots, masks and residuals."""
    given = ExportRequest(
        str(tiny_base),
        Path(),
        adapters=(AdapterFile("tiny", tiny_adapter_file),),
        slots=ImageSlots(2, has_masks=True),
        controlnets=(ControlNetSource("edges", str(tiny_controlnets["edges"])),),
    )
    bundle = made_once(
        session_folder, "tiny_masked_control_bundle", lambda output: export_bundle(replace(given, output=output))
    )
    mask = IPAdapterMaskProcessor().preprocess([hole()], height=64, width=64).reshape(1, 1, 64, 64)
    extra = {"cross_attention_kwargs": {"ip_adapter_masks": [mask]}}
    expected = run_diffusers(models, tiny_base, tiny_adapter_file, make_request(EDGES, **IMAGE), **extra)
    prompt = ImagePrompt((picture(9),), scale=0.7, masks=(hole(),))
    with Pipeline.open(bundle, engine="onnxruntime") as pipe:
        assert_close(last_latents(pipe, make_request(EDGES, image_prompts=(prompt,))), expected)


@pytest.mark.parametrize("fields", [{}, IMAGE])
def test_without_control_image_the_bundle_is_a_plain_one(
    pipeline: Pipeline, tiny_bundle: Path, fields: dict[str, Any]
) -> None:
    request = make_request(**fields)
    found = last_latents(pipeline, request)
    with Pipeline.open(tiny_bundle, engine="onnxruntime") as plain:
        assert_close(found, last_latents(plain, request), 1e-5)
    silent = make_request(ControlImage(picture(1), "edges", scale=0), ControlImage(picture(2), "pose", scale=0))
    np.testing.assert_array_equal(last_latents(pipeline, silent), last_latents(pipeline, make_request()))


def test_a_bundle_without_controlnets_has_the_same_unet_as_before(tiny_bundle: Path, tiny_control_bundle: Path) -> None:
    plain, controlled = (
        json.loads((folder / "manifest.json").read_text()) for folder in (tiny_bundle, tiny_control_bundle)
    )
    names = [[tensor["name"] for tensor in one["components"]["unet"]["spec"]["inputs"]] for one in (plain, controlled)]
    assert names[0] == ["sample", "timestep", "text_kv", "image_kv"]
    assert names[1] == [*names[0], *(f"down_block_res_{index}" for index in range(12)), "mid_block_res"]
    for part in ("text_encoder", "text_kv", "image_encoder", "vae_decoder", "vae_encoder"):
        assert plain["components"][part] == controlled["components"][part]


def test_a_batch_of_control_images(pipeline: Pipeline) -> None:
    """Each request has its own picture, scale and steps; one of them is silent in the last step."""
    controls = (ControlImage(picture(1), "edges", 0.9), ControlImage(picture(5), "edges", 0.4, end=0.7))
    requests = [
        make_request(control, POSE, seed=seed, num_images=seed, guess_mode=True)
        for seed, control in enumerate(controls, 1)
    ]
    assert pipeline.batch_key(requests[0]) == pipeline.batch_key(requests[1])
    together = pipeline.run_batch(requests)
    for request, result in zip(requests, together, strict=True):
        for found, alone in zip(result.images, pipeline.run(request).images, strict=True):
            assert np.abs(np.asarray(found, int) - np.asarray(alone, int)).max() <= 2
    others = (make_request(EDGES), make_request(POSE), make_request(EDGES, guess_mode=True), make_request())
    assert len({pipeline.batch_key(request) for request in others}) == 4


def test_engines_close_after_each_stage(tiny_control_bundle: Path, pipeline: Pipeline) -> None:
    request = make_request(EDGES, **IMAGE)
    with Pipeline.open(tiny_control_bundle, engine="onnxruntime", keep_engines=False) as pipe:
        np.testing.assert_array_equal(
            np.asarray(pipe.run(request).images[0]), np.asarray(pipeline.run(request).images[0])
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": picture(1), "name": "depth"}, r"no ControlNet 'depth' \(it has: edges, mood, pose\).*--controlnet"),
        ({"image": picture(1)}, "several ControlNets: write --control-image NAME=FILE, with NAME one of edges"),
        ({"image": "missing.png", "name": "edges"}, r"missing\.png"),
        ({"image": None, "name": "edges"}, "control image of ControlNet 'edges' is None"),
        ({"image": picture(1), "name": "edges", "scale": float("nan")}, "scale of ControlNet 'edges' is nan"),
        ({"image": picture(1), "name": "edges", "scale": "loud"}, "expected a finite number"),
        ({"image": picture(1), "name": 3}, "name of a ControlNet is 3"),
        ({"image": picture(1), "name": "edges", "start": 0.5, "end": 0.5}, "less than the end"),
        ({"image": picture(1), "name": "edges", "end": 1.5}, "a number from 0 to 1"),
        ({"image": picture(1), "name": "edges", "start": float("nan")}, "finite"),
    ],
)
def test_bad_control_images(pipeline: Pipeline, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipeline.run(make_request(ControlImage(**fields)))


def test_what_does_not_go_together(pipeline: Pipeline, tiny_bundle: Path) -> None:
    with pytest.raises(RequestError, match="--guess-mode"):
        make_request(guess_mode=True)
    with pytest.raises(RequestError, match="guess_mode is 1"):
        make_request(EDGES, guess_mode=1)
    with pytest.raises(RequestError, match="tuple of ControlImage"):
        make_request(controls=(picture(1),))
    with pytest.raises(RequestError, match="ControlNets"):
        pipeline.run_batch([make_request(EDGES), make_request(POSE)])
    with (
        Pipeline.open(tiny_bundle, engine="onnxruntime") as plain,
        pytest.raises(IpaError, match=r"has no ControlNet: export it again with .*--controlnet"),
    ):
        plain.run(make_request(EDGES))
