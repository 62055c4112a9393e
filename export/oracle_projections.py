"""diffusers' image projections with the weights of an adapter, for every kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
)
from torch import Tensor

from ipa.export.adapter_kinds import BASE, FULL_FACE, PLUS
from ipa.export.adapter_modules import HEAD_WIDTH
from ipa.export.adapters import AdapterWeights

State = Mapping[str, Tensor]
# By kind, names of a file as patterns and diffusers' names for them.
_NAMES = {
    BASE.name: {r"^proj\.": "image_embeds."},
    FULL_FACE.name: {r"^proj\.0": "ff.net.0.proj", r"^proj\.2": "ff.net.2", r"^proj\.3": "norm"},
    PLUS.name: {
        r"\.0\.norm1\.": ".ln0.",
        r"\.0\.norm2\.": ".ln1.",
        r"\.0\.to_out\.": ".attn.to_out.0.",
        r"\.0\.to_": ".attn.to_",
        r"\.1\.0\.(weight|bias)": r".ff.0.\1",
        r"\.1\.1\.weight": ".ff.1.net.0.proj.weight",
        r"\.1\.3\.weight": ".ff.1.net.2.weight",
    },
}


def diffusers_projection(weights: AdapterWeights) -> Any:
    """diffusers' module for the adapter's kind: image feature to (batch, tokens, text_width)."""
    make = {BASE.name: _base, FULL_FACE.name: _full_face, PLUS.name: _plus}[weights.kind.name]
    width = weights.keys_values[0].shape[1]
    projection = make(weights.projection, weights.tokens, width)
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.projection.items():
        for pattern, replacement in _NAMES[weights.kind.name].items():
            name = re.sub(pattern, replacement, name)
        if name.endswith(".to_kv.weight"):
            key, value = tensor.chunk(2)
            renamed |= {name.replace("to_kv", "to_k"): key, name.replace("to_kv", "to_v"): value}
        else:
            renamed[name] = tensor
    projection.load_state_dict(renamed)
    return projection


def _base(state: State, tokens: int, width: int) -> Any:
    return ImageProjection(state["proj.weight"].shape[1], width, tokens)


def _full_face(state: State, tokens: int, width: int) -> Any:
    return IPAdapterFullImageProjection(state["proj.0.weight"].shape[1], width)


def _plus(state: State, tokens: int, width: int) -> Any:
    feed_forward_width, latent_width = state["layers.0.1.1.weight"].shape
    return IPAdapterPlusImageProjection(
        embed_dims=state["proj_in.weight"].shape[1],
        output_dims=width,
        hidden_dims=latent_width,
        depth=len({name.split(".")[1] for name in state if name.startswith("layers.")}),
        dim_head=HEAD_WIDTH,
        heads=len(state["layers.0.0.to_q.weight"]) // HEAD_WIDTH,
        num_queries=tokens,
        ffn_ratio=(feed_forward_width + 0.5) / latent_width,  # diffusers rounds the product down
    )
