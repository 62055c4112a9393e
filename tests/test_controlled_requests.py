"""Requests with control images: batches, what makes no difference, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from controlled import EDGES, IMAGE, POSE, last_latents, make_request, picture

from ipa.engines.errors import IpaError, RequestError
from ipa.runtime import ControlImage, Pipeline


@pytest.fixture(scope="module")
def pipeline(tiny_control_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_control_bundle, engine="onnxruntime") as pipe:
        yield pipe


@pytest.mark.parametrize("fields", [{}, IMAGE])
def test_without_control_image_the_bundle_is_a_plain_one(
    pipeline: Pipeline, tiny_bundle: Path, fields: dict[str, Any]
) -> None:
    request = make_request(**fields)
    found = last_latents(pipeline, request)
    with Pipeline.open(tiny_bundle, engine="onnxruntime") as plain:
        expected = last_latents(plain, request)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
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
        ({"image": picture(1), "name": "edges", "start": float("nan")}, "a number from 0 to 1"),
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
