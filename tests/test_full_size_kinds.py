"""Every published adapter file at full size: names and shapes on the meta device, parameter counts as published.

Counts: `image_proj` of each kind and 19,169,280 (SD1.5) or 340,787,200 (SDXL) in `ip_adapter`, from the files' shapes.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import Shapes, base_shapes, flat, full_face_shapes, layer_shapes, resampler_shapes
from safetensors.torch import save_file

from ipa.benchmarks.full_size import SD15_UNET, SDXL_UNET
from ipa.engines.engine import GraphFile
from ipa.engines.errors import IpaError
from ipa.engines.kv_layout import KVLayout
from ipa.engines.registry import open_engine
from ipa.engines.spec import Dimensions
from ipa.export.adapters import AdapterWeights, adapter_graph, fitted, read_adapter
from ipa.export.checks import TOLERANCES, agreement
from ipa.export.hoist import config_kv_layout
from ipa.export.onnx_export import export_graph
from ipa.export.oracle_projections import diffusers_projection

UNETS: dict[str, tuple[dict[str, Any], int]] = {"sd15": (SD15_UNET, 19_169_280), "sdxl": (SDXL_UNET, 340_787_200)}
ENCODERS = {"ViT-H": (1024, 1280), "ViT-bigG": (1280, 1664)}  # widths of embedding and hidden states
PLUS_SDXL = resampler_shapes(1280, 16, 2048, latent_width=1280, attention_width=1280)
PLUS_SD15 = resampler_shapes(1280, 16, 768, latent_width=768, attention_width=768)
# File: base model, image encoder, `image_proj`, its parameters, kind, tokens.
PUBLISHED: dict[str, tuple[str, str, Shapes, int, str, int]] = {
    "ip-adapter_sd15": ("sd15", "ViT-H", base_shapes(1024, 4, 768), 3_150_336, "base", 4),
    "ip-adapter_sd15_vit-G": ("sd15", "ViT-bigG", base_shapes(1280, 4, 768), 3_936_768, "base", 4),
    "ip-adapter-plus_sd15": ("sd15", "ViT-H", PLUS_SD15, 29_918_208, "plus", 16),
    "ip-adapter-full-face_sd15": ("sd15", "ViT-H", full_face_shapes(1280, 768), 2_625_024, "full-face", 257),
    "ip-adapter_sdxl": ("sdxl", "ViT-bigG", base_shapes(1280, 4, 2048), 10_498_048, "base", 4),
    "ip-adapter_sdxl_vit-h": ("sdxl", "ViT-H", base_shapes(1024, 4, 2048), 8_400_896, "base", 4),
    "ip-adapter-plus_sdxl_vit-h": ("sdxl", "ViT-H", PLUS_SDXL, 82_961_664, "plus", 16),
}
MAX_MEMORY = 6 * 2**20  # KiB, as getrusage counts


@cache
def base_model(family: str, encoder: str) -> tuple[KVLayout, Dimensions]:
    """Layers and sizes of a full-size base model with an image encoder."""
    config, _ = UNETS[family]
    layout = config_kv_layout(config)
    embed_width, hidden_width = ENCODERS[encoder]
    width = config["cross_attention_dim"]
    return layout, Dimensions(77, width, layout.size, 224, embed_width, 257, hidden_width, 4, 4)


def fit(file: str, family: str, encoder: str) -> AdapterWeights:
    """A published file's shapes, checked against a base model."""
    own, _, image_proj, *_ = PUBLISHED[file]
    config, _ = UNETS[own]
    layers = layer_shapes(list(base_model(own, encoder)[0].widths), config["cross_attention_dim"])
    state = {name: torch.empty(shape, device="meta") for name, shape in flat(image_proj, layers).items()}
    return fitted(Path(f"{file}.safetensors"), state, "", *base_model(family, encoder))


@pytest.mark.parametrize("file", PUBLISHED)
def test_every_published_file_is_accepted(file: str) -> None:
    family, encoder, _, parameters, kind, tokens = PUBLISHED[file]
    weights = fit(file, family, encoder)
    assert (weights.kind.name, weights.tokens) == (kind, tokens)
    assert sum(tensor.numel() for tensor in weights.projection.values()) == parameters
    assert sum(tensor.numel() for tensor in weights.keys_values) == UNETS[family][1]
    layout, dimensions = base_model(family, encoder)
    graph = adapter_graph("x", weights, dimensions, "float32")
    feature, image_kv = graph.spec.inputs[0], graph.spec.outputs[0]
    sizes = [2 if axis == "batch" else int(axis) for axis in feature.axes]
    with torch.device("meta"):
        assert graph.module(torch.empty(sizes)).shape == (2, tokens, layout.size)
    assert image_kv.axes == ("batch", tokens, layout.size)


@pytest.mark.parametrize("file", PUBLISHED)
def test_every_published_file_is_refused_elsewhere(file: str) -> None:
    family, encoder, *_ = PUBLISHED[file]
    other = {"sd15": "sdxl", "sdxl": "sd15"}[family]
    width, other_width = (UNETS[name][0]["cross_attention_dim"] for name in (family, other))
    with pytest.raises(IpaError, match=f"text width {width}, this one has {other_width}"):
        fit(file, other, encoder)
    other_encoder = {"ViT-H": "ViT-bigG", "ViT-bigG": "ViT-H"}[encoder]
    place = PUBLISHED[file][4] != "base"
    with pytest.raises(
        IpaError, match=f"width {ENCODERS[encoder][place]}, this one has {ENCODERS[other_encoder][place]}"
    ):
        fit(file, family, other_encoder)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["ip-adapter-plus_sd15", "ip-adapter-full-face_sd15", "ip-adapter-plus_sdxl_vit-h"])
def test_full_size_files_export_and_run(file: str, tmp_path: Path) -> None:
    """In a process of its own, which tells how much memory it took."""
    done = subprocess.run([sys.executable, __file__, file, tmp_path], check=True, stdout=subprocess.PIPE, text=True)
    verdict, peak = done.stdout.splitlines()
    assert verdict.startswith("ok"), verdict
    assert int(peak) < MAX_MEMORY


def main(file: str, folder: Path) -> None:
    """Write a file of published size with random weights, export it in FP16, run it, compare with diffusers in FP32."""
    family, encoder, image_proj, *_ = PUBLISHED[file]
    layout, dimensions = base_model(family, encoder)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in flat(image_proj, layer_shapes(list(layout.widths), dimensions.text_width)).items():
        state[name] = torch.randn(shape, generator=generator, dtype=torch.float16) * shape[-1] ** -0.5
        if len(shape) == 1 and name.endswith("weight"):  # of a norm
            state[name] += 1
    save_file(state, folder / "adapter.safetensors")
    del state
    weights = read_adapter(folder / "adapter.safetensors", layout, dimensions)
    hidden_states = torch.randn(2, 257, 1280, generator=generator).half()
    with torch.no_grad():
        tokens = diffusers_projection(weights)(hidden_states.float())
        expected = torch.cat([tokens @ weight.T for weight in weights.keys_values], dim=-1).numpy()
    graph = adapter_graph(file, weights, dimensions, "float16")
    del weights
    path, _ = export_graph(graph, folder / "model.onnx", 18)
    spec = graph.spec
    del graph
    with open_engine("onnxruntime", GraphFile(f"ip_adapter/{file}", spec, path)) as engine:
        found = engine(hidden_states=hidden_states.numpy())["image_kv"]
    print(agreement(file, "", {"": found}, {"": expected}, TOLERANCES["float16"]))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
