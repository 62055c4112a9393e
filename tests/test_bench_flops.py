"""Operations of the published models, against the counts that are known of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ipa.benchmarks import flops, rates
from ipa.benchmarks.full_size import CLIP_VISION, SD15_UNET, SD15_VAE, SDXL_UNET, SDXL_VAE


# Per sample, 2 operations for each multiply-add; rounded to a tenth.
@pytest.mark.parametrize(("config", "side", "gflop"), [(SD15_UNET, 64, 803.3), (SDXL_UNET, 128, 6761.2)])
def test_unets(config: dict[str, Any], side: int, gflop: float) -> None:
    assert flops.unet_gflop(dict(config), 1, side, side) == pytest.approx(gflop, abs=0.05)


def test_a_guidance_pair_is_two_samples() -> None:
    one, two = (flops.unet_gflop(dict(SD15_UNET), batch, 32, 32) for batch in (1, 2))
    assert two == pytest.approx(2 * one, rel=1e-9)


@pytest.mark.parametrize(("config", "side", "gflop"), [(SD15_VAE, 64, 2514.5), (SDXL_VAE, 128, 10470.4)])
def test_vae_decoders(config: dict[str, Any], side: int, gflop: float) -> None:
    assert flops.vae_decoder_gflop(dict(config), side, side) == pytest.approx(gflop, abs=0.05)


def test_image_encoder() -> None:
    assert flops.image_encoder_gflop(dict(CLIP_VISION)) == pytest.approx(334.6, abs=0.05)


def test_a_pipeline_folder(tiny_base: Path) -> None:
    counts = flops.pipeline_gflop(tiny_base, 2, 64, 64)
    assert set(counts) == {"unet", "vae_decoder", "text_encoder", "image_encoder"}
    assert min(counts.values()) > 0
    assert flops.unet_weights(tiny_base) > 100_000


def test_the_floor_is_the_longer_of_computing_and_reading() -> None:
    assert rates.floor_seconds(100.0, 10**9, "float32", matmul=50.0, bandwidth=8.0) == 2.0
    assert rates.floor_seconds(100.0, 10**9, "float32", matmul=50.0, bandwidth=1.0) == 4.0
    assert rates.floor_seconds(100.0, 10**9, "float16", matmul=50.0, bandwidth=0.5) == 4.0
