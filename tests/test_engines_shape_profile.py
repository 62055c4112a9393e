"""Profiles: options to ranges, ranges to the shapes of every input of the spec table."""

from __future__ import annotations

import pytest

from ipa.engines.errors import RequestError
from ipa.engines.shape_profile import Range, ShapeProfile, as_text, covers
from ipa.engines.spec import ONE_SLOT, SPECS, adapter_spec, control_residuals, controlnet_spec, unet_spec

SIZES = {
    "text_tokens": 77,
    "text_width": 768,
    "kv": 24960,
    "image_size": 224,
    "image_embed_width": 1024,
    "image_patches": 257,
    "image_hidden_width": 1280,
    "latent_channels": 4,
    "unet_in_channels": 4,
}


@pytest.fixture
def profile() -> ShapeProfile:
    return ShapeProfile.parse(["512x640", "256x512", "768x512"], "2:2:4", "3:4:1028")


def test_the_unet_has_both_halves_and_every_size_between(profile: ShapeProfile) -> None:
    shapes = profile.shapes("unet", SPECS["unet"].resolved(SIZES, "float16"), 8)
    assert shapes == {
        "sample": ((2, 4, 64, 32), (4, 4, 80, 64), (8, 4, 80, 96)),
        "text_kv": ((2, 77, 24960), (4, 77, 24960), (8, 77, 24960)),
        "image_kv": ((2, 1, 24960), (4, 4, 24960), (8, 1028, 24960)),
    }, "timestep has no free axis; one token is a request without image prompt"


@pytest.mark.parametrize("component", SPECS)
def test_every_free_axis_of_the_table_has_a_range(profile: ShapeProfile, component: str) -> None:
    spec = SPECS[component].resolved(SIZES, "float16")
    shapes = profile.shapes(component, spec, 8)
    for tensor in spec.inputs:
        if tensor.name in shapes:
            smallest, usual, largest = shapes[tensor.name]
            assert all(a <= b <= c for a, b, c in zip(smallest, usual, largest, strict=True))


def test_the_vae_takes_picture_by_picture(profile: ShapeProfile) -> None:
    spec = SPECS["vae_decoder"].resolved(SIZES, "float16")
    assert [shape[0] for shape in profile.shapes("vae_decoder", spec, 8)["latents"]] == [1, 1, 8]


def test_controlnets_and_their_unet_have_the_same_maps(profile: ShapeProfile) -> None:
    residuals = control_residuals((320, 640, 1280, 1280), (2, 2, 2, 2))
    assert len(residuals) == 13
    spec = controlnet_spec(residuals).resolved(SIZES, "float16")
    shapes = profile.shapes("controlnet/x", spec, 8)
    assert shapes["controlnet_cond"] == ((2, 3, 512, 256), (4, 3, 640, 512), (8, 3, 640, 768))
    assert shapes["sample"] == ((2, 4, 64, 32), (4, 4, 80, 64), (8, 4, 80, 96))
    unet = profile.shapes("unet", unet_spec(ONE_SLOT, (), residuals).resolved(SIZES, "float16"), 8)
    assert unet["down_block_res_0"] == ((2, 320, 64, 32), (4, 320, 80, 64), (8, 320, 80, 96))
    assert unet["down_block_res_3"] == ((2, 320, 32, 16), (4, 320, 40, 32), (8, 320, 40, 48))
    assert unet["mid_block_res"] == ((2, 1280, 8, 4), (4, 1280, 10, 8), (8, 1280, 10, 12))


def test_adapters_see_the_negative_half(profile: ShapeProfile) -> None:
    spec = adapter_spec("image_embeds").resolved(SIZES, "float16")
    assert profile.shapes("ip_adapter/x", spec, 8) == {"image_embeds": ((1, 1024), (2, 1024), (8, 1024))}
    spec = adapter_spec("hidden_states").resolved(SIZES, "float16")
    assert profile.shapes("ip_adapter/x", spec, 8) == {
        "hidden_states": ((1, 257, 1280), (2, 257, 1280), (8, 257, 1280))
    }


def test_the_encoder_takes_an_image_and_the_zero_picture() -> None:
    """Adapters that read hidden states have the encoder's of zero pixels as their negative half."""
    spec = SPECS["image_encoder"].resolved(SIZES, "float16")
    smallest, _, largest = ShapeProfile.parse(["512x512"], "1", "4").shapes("image_encoder", spec, 8)["pixel_values"]
    assert (smallest[0], largest[0]) == (1, 2)


def test_as_text() -> None:
    assert as_text({"b": ((1, 2), (3, 4), (5, 6)), "a": ((1,), (1,), (1,))}) == "a 1:1:1, b 1x2:3x4:5x6"


def test_one_number_is_a_fixed_size() -> None:
    assert Range.parse("4", "--batch") == Range(4, 4, 4)


@pytest.mark.parametrize("text", ["", "0", "1:2", "2:1:4", "1:4:2", "a", "1:2:3:4", "-1", "1:1:99999999"])
def test_bad_ranges_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--batch"):
        Range.parse(text, "--batch")


@pytest.mark.parametrize("text", ["512", "512x", "512x500", "32x64", "x", "512X512"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--resolution"):
        ShapeProfile.parse([text], "1", "4")


def test_which_shapes_a_profile_covers() -> None:
    profile = "image_kv 1x1x9:2x4x9:4x8x9, sample 1x4x8x8:2x4x16x16:4x4x16x16"
    fits = {"sample": (2, 4, 8, 16), "image_kv": (4, 8, 9), "timestep": ()}
    assert covers(profile, fits)
    assert not covers(profile, {**fits, "sample": (2, 4, 8, 17)})
    assert not covers(profile, {**fits, "image_kv": (0, 8, 9)})
    assert covers("", {"timestep": ()})
