"""The UNet's graph without any image prompt: what the image prompt's cost is measured against.

`hoisted` differs from a bundle's UNet in the image prompt alone: keys and values of the text come in ready-made.
`ordinary` differs from the single graph of `ipa-export onnx --merged` in the image prompt alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ipa.engines.spec import SPECS, ComponentSpec, ImageSlots, TensorSpec
from ipa.export import winograd
from ipa.export.controlnets import TextAttention
from ipa.export.hoist import HoistedUNet
from ipa.export.onnx_export import Graph, export_graph
from ipa.export.precision import to_half

OPSET = 18
TEXT_TOKENS = 77  # CLIP's
DESCRIPTION = "spec.json"


class OrdinaryUNet(nn.Module):
    """The UNet as diffusers has it: text states in."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        unet.set_attn_processor(TextAttention())
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        """`noise_pred`."""
        return self.unet(sample, timestep, states, return_dict=False)[0]  # type: ignore[no-any-return]


def write_hoisted_graph(base: Path, folder: Path, unet_spec: ComponentSpec, usual: Mapping[str, int]) -> None:
    """Write `model.onnx`, what a bundle has beside it for onnxruntime, and `spec.json`.

    Args:
        base: pipeline folder in diffusers format, of the family of Stable Diffusion 1.x.
        folder: made; complete once `spec.json` is there.
        unet_spec: of the bundle's UNet, with one slot.
        usual: sizes of the free axes, for the variant, as the bundle's was chosen for.
    """
    if (folder / DESCRIPTION).exists():
        return
    inputs = tuple(tensor for tensor in unet_spec.inputs if tensor.name not in ImageSlots(1).image_kv)
    module = HoistedUNet(_unet(base), ImageSlots(0))
    file = _write(module, ComponentSpec(inputs, unet_spec.outputs), folder, is_standard=False)
    winograd.write_winograd_graph(file, usual)
    _describe(ComponentSpec(inputs, unet_spec.outputs), folder)


def write_ordinary_graph(base: Path, folder: Path, dtype: str) -> None:
    """Write `model.onnx`, of operators of the ONNX standard alone, and `spec.json`; see `write_hoisted_graph`."""
    if (folder / DESCRIPTION).exists():
        return
    unet = _unet(base)
    sample, timestep, *_ = SPECS["unet"].inputs
    states = TensorSpec("encoder_hidden_states", ("batch", "text_tokens", unet.config.cross_attention_dim))
    sizes = {"unet_in_channels": unet.config.in_channels, "latent_channels": unet.config.out_channels}
    sizes["text_tokens"] = TEXT_TOKENS
    spec = ComponentSpec((sample, timestep, states), SPECS["unet"].outputs).resolved(sizes, dtype)
    _write(OrdinaryUNet(unet), spec, folder, is_standard=True)
    _describe(spec, folder)


def graph_for(folder: Path, engine: str) -> Path:
    """The graph that a back-end runs, as it would of a bundle."""
    variant = folder / winograd.FILE
    return variant if engine == winograd.ENGINE and variant.exists() else folder / "model.onnx"


def _unet(base: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float32).eval()


def _write(module: nn.Module, spec: ComponentSpec, folder: Path, is_standard: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    typed = to_half(module) if spec.inputs[0].dtype == "float16" else module
    return export_graph(Graph("unet", typed, spec), folder / "model.onnx", OPSET, is_standard)[0]


def _describe(spec: ComponentSpec, folder: Path) -> None:
    (folder / DESCRIPTION).write_text(json.dumps(asdict(spec)), "utf-8")
