"""The UNet with its keys and values outside equals diffusers' UNet with its IP-Adapter inside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from oracle import diffusers_noise, diffusers_unet
from tiny import EMBED_WIDTH, TEXT_WIDTH, cross_attention_widths, tiny_adapter, tiny_pipeline

from ipa.engines.bundle import Bundle
from ipa.engines.engine import Engine
from ipa.export.adapters import read_adapter
from ipa.export.dimensions import manifest_dimensions
from ipa.export.hoist import HoistedUNet, config_kv_layout, kv_layout, text_kv_linear

SIZES = [(1, 8, 8, 0.0), (2, 16, 16, 999.0), (3, 9, 25, 500.0), (2, 20, 28, 1.0)]


@pytest.fixture(scope="module")
def unet_engine(tiny_bundle: Path) -> Iterator[Engine]:
    with Bundle.open(tiny_bundle, verify=False).open_component("unet", "onnxruntime") as engine:
        yield engine


@pytest.mark.parametrize(("batch", "height", "width", "timestep"), SIZES)
def test_exported_chain_equals_diffusers(
    unet_engine: Engine,
    tiny_bundle: Path,
    tiny_base: Path,
    tiny_adapter_file: Path,
    batch: int,
    height: int,
    width: int,
    timestep: float,
) -> None:
    generator = torch.Generator().manual_seed(batch)
    sample = torch.randn(batch, 4, height, width, generator=generator)
    text = torch.randn(batch, 77, TEXT_WIDTH, generator=generator)
    embeds = torch.randn(batch, EMBED_WIDTH, generator=generator)
    bundle = Bundle.open(tiny_bundle, verify=False)
    unet = diffusers_unet(tiny_base, tiny_adapter_file)
    with (
        bundle.open_component("text_kv", "onnxruntime") as text_kv,
        bundle.open_component("ip_adapter/tiny", "onnxruntime") as adapter,
    ):
        packed_text = text_kv(encoder_hidden_states=text.numpy())["text_kv"]
        for scale in (0.0, 0.6, 1.3):
            image_kv = adapter(image_embeds=embeds.numpy())["image_kv"]
            for values in bundle.manifest.kv_layout.value_slices():
                image_kv[..., values] *= scale
            found = unet_engine(
                sample=sample.numpy(), timestep=np.asarray(timestep, np.float32), text_kv=packed_text, image_kv=image_kv
            )["noise_pred"]
            expected = diffusers_noise(unet, sample, timestep, text, embeds, scale).numpy()
            # float32 sums in another order; outputs reach about 2
            np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 8, "widths": (24, 48, 48, 48)},
        {"heads": 3, "use_linear_projection": True},
        {"heads": 2, "upcast_attention": True, "only_cross_attention": False},
    ],
)
def test_hoisted_module_equals_diffusers(tmp_path: Path, options: dict[str, Any]) -> None:
    base = tiny_pipeline(tmp_path, **options)
    unet = UNet2DConditionModel.from_pretrained(base / "unet").eval().requires_grad_(False)
    sample, text = torch.randn(2, 4, 9, 16), torch.randn(2, 77, TEXT_WIDTH)
    with torch.no_grad():
        expected = unet(sample, 7, text).sample
        packed, layout = text_kv_linear(unet)(text), kv_layout(unet)
        found = HoistedUNet(unet)(sample, torch.tensor(7.0), packed, torch.zeros(2, 1, layout.size))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("tokens", [1, 16, 257])
def test_any_number_of_tokens(unet_engine: Engine, tiny_base: Path, tokens: int) -> None:
    """The image's tokens are one softmax of their own: against PyTorch's attention over that many keys."""
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet").eval().requires_grad_(False)
    layout = kv_layout(unet)
    text_kv = torch.randn(1, 77, layout.size)
    image_kv, sample = torch.randn(1, tokens, layout.size), torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        expected = HoistedUNet(unet)(sample, torch.tensor(3.0), text_kv, image_kv).numpy()
    found = unet_engine(
        sample=sample.numpy(), timestep=np.asarray(3, np.float32), text_kv=text_kv.numpy(), image_kv=image_kv.numpy()
    )["noise_pred"]
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


def test_layout_is_the_order_of_adapter_files(tiny_base: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet")
    layout = kv_layout(unet)
    names = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    assert [layer.name for layer in layout.layers] == names
    assert layout.layers[-1].name.startswith("mid_block")
    assert list(layout.widths) == cross_attention_widths(unet.config)
    assert config_kv_layout(unet.config) == layout


def test_sd15_layout_has_the_published_size() -> None:
    widths = (320, 640, 1280, 1280)
    config = dict(UNet2DConditionModel(block_out_channels=(8, 8, 8, 8), norm_num_groups=8).config)
    layout = config_kv_layout(
        {**config, "block_out_channels": widths, "norm_num_groups": 32, "cross_attention_dim": 768}
    )
    assert (len(layout.layers), layout.size) == (16, 24960)


def test_adapter_of_16_tokens(tmp_path: Path, tiny_bundle: Path, tiny_base: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet")
    file = tiny_adapter(dict(unet.config), tmp_path / "wide.bin", tokens=16, dtype=torch.float16)
    bundle = Bundle.open(tiny_bundle, verify=False)
    weights = read_adapter(file, bundle.manifest.kv_layout, manifest_dimensions(bundle.manifest))
    assert weights.tokens == 16
    assert weights.module()(torch.randn(2, EMBED_WIDTH)).shape == (2, 16, bundle.manifest.kv_layout.size)
