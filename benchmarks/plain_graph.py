"""The UNet's graph as it is without any image prompt: what the image prompt's cost is measured against."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ipa.engines.spec import SPECS, ComponentSpec, TensorSpec
from ipa.export import winograd
from ipa.export.controlnets import TextAttention
from ipa.export.onnx_export import Graph, export_graph
from ipa.export.precision import to_half

OPSET = 18
TEXT_TOKENS = 77  # CLIP's
DESCRIPTION = "spec.json"


class PlainUNet(torch.nn.Module):
    """The UNet without image prompt: text states in; the same attention kernels as the hoisted one."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        """`noise_pred`."""
        return self.unet(sample, timestep, states, return_dict=False)[0]  # type: ignore[no-any-return]


def write_plain_graph(base: Path, folder: Path, dtype: str, usual: Mapping[str, int], is_standard: bool) -> None:
    """Write `model.onnx`, what a bundle has beside it for onnxruntime, and `spec.json`.

    Args:
        base: pipeline folder in diffusers format, of the family of Stable Diffusion 1.x.
        folder: made; complete once `spec.json` is there.
        dtype: of weights and inputs.
        usual: sizes of the free axes, for the variant.
        is_standard: write operators of the ONNX standard alone, and no variant, as `ipa-export onnx --merged` does.
    """
    if (folder / DESCRIPTION).exists():
        return
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float32).eval()
    unet.set_attn_processor(TextAttention())
    sample, timestep, *_ = SPECS["unet"].inputs
    states = TensorSpec("encoder_hidden_states", ("batch", "text_tokens", unet.config.cross_attention_dim))
    sizes = {"unet_in_channels": unet.config.in_channels, "latent_channels": unet.config.out_channels}
    sizes["text_tokens"] = TEXT_TOKENS
    spec = ComponentSpec((sample, timestep, states), SPECS["unet"].outputs).resolved(sizes, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    module = PlainUNet(to_half(unet) if dtype == "float16" else unet)
    path, *_ = export_graph(Graph("unet", module, spec), folder / "model.onnx", OPSET, is_standard)
    if not is_standard:
        winograd.write_winograd_graph(path, usual)
    (folder / DESCRIPTION).write_text(json.dumps(asdict(spec)), "utf-8")


def graph_for(folder: Path, engine: str) -> Path:
    """The graph that a back-end runs, as it would of a bundle."""
    variant = folder / winograd.FILE
    return variant if engine == winograd.ENGINE and variant.exists() else folder / "model.onnx"
