"""IP-Adapter files: what kind they are, whether they fit a base model, and the graph made of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from ipa.engines.bundle import hash_file
from ipa.engines.errors import IpaError
from ipa.engines.spec import Dimensions, KVLayout, adapter_spec
from ipa.export.hoist import packed_linear
from ipa.export.onnx_export import Graph
from ipa.export.precision import to_half
from ipa.trainer.errors import TrainError
from ipa.trainer.weights import load_adapter

BASE = "base"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
# Keys that tell the kinds apart; the order matters, as later kinds have the keys of earlier ones, too.
_KIND_KEYS = (
    ("proj.weight", BASE),
    ("proj.3.weight", "full-face"),
    ("perceiver_resampler.proj_in.weight", "FaceID-Plus"),
    ("norm.weight", "FaceID"),
    ("latents", "plus"),
)


@dataclass(frozen=True)
class AdapterFile:
    """A file and the name that the bundle will know it by."""

    name: str
    path: Path

    @classmethod
    def parse(cls, text: str) -> AdapterFile:
        """`[NAME=]FILE`; without a name the file's stem is the name.

        Raises:
            IpaError: the name has other characters than letters, digits, `_` and `-`.
        """
        name, separator, path = text.partition("=")
        if not separator or "/" in name:
            path, name = text, re.sub(r"[^A-Za-z0-9_-]+", "-", Path(text).stem).strip("-")
        if not _NAME.fullmatch(name):
            raise IpaError(f"adapter name {name!r} may hold only letters, digits, '_' and '-'; use NAME=FILE")
        return cls(name, Path(path))


@dataclass(frozen=True)
class AdapterWeights:
    """A base-kind adapter: image embedding -> `tokens` tokens -> keys and values of every layer."""

    kind: str
    tokens: int
    feature: str
    projection: dict[str, Tensor]  # proj.weight, proj.bias, norm.weight, norm.bias
    keys_values: tuple[Tensor, ...]  # K_0, V_0, K_1, V_1, ... each (width, text_width)
    source_sha256: str

    def scaled(self, scale: float) -> AdapterWeights:
        """The same adapter with a fixed `ip_adapter_scale`: attention is linear in the values."""
        keys_values = tuple(weight * scale if index % 2 else weight for index, weight in enumerate(self.keys_values))
        return replace(self, keys_values=keys_values)


class BaseAdapter(nn.Module):
    """Image projection and packed `to_k_ip`/`to_v_ip`. Source: arXiv:2308.06721, section 3.2."""

    def __init__(self, weights: AdapterWeights) -> None:
        super().__init__()
        out_features, in_features = weights.projection["proj.weight"].shape
        self.tokens, self.width = weights.tokens, out_features // weights.tokens
        self.proj = nn.Linear(in_features, out_features)
        self.norm = nn.LayerNorm(self.width)
        self.load_state_dict(weights.projection)
        self.kv = packed_linear(weights.keys_values)
        self.requires_grad_(False)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`image_kv`, unscaled."""
        tokens: Tensor = self.proj(image_embeds).reshape(-1, self.tokens, self.width)
        image_kv: Tensor = self.kv(self.norm(tokens))
        return image_kv


def read_adapter(path: Path, layout: KVLayout, dimensions: Dimensions) -> AdapterWeights:
    """Read a `.safetensors` or `.bin` file and check it against a base model.

    Args:
        layout: the cross-attention layers of the base model's UNet.
        dimensions: widths of its text and image encoders.
    Returns:
        The weights in float32.
    Raises:
        IpaError: the file is missing, damaged, unsafe, of a kind not supported yet, or for another model.
    """
    try:
        state = {name: tensor.float() for name, tensor in load_adapter(path).items()}
    except TrainError as error:
        raise IpaError(f"adapter {error}") from error
    projection = _group(state, "image_proj.")
    kind = next((kind for key, kind in _KIND_KEYS if key in projection), "unknown")
    if kind != BASE:
        raise IpaError(f"adapter {path} is of the kind {kind}, which is not supported yet; expected a base IP-Adapter")
    _expect_keys(path, "image_proj", set(projection), {"proj.weight", "proj.bias", "norm.weight", "norm.bias"})
    layers = _group(state, "ip_adapter.")
    widths = {tensor.shape[-1] for tensor in layers.values()}
    if widths != {dimensions.text_width}:
        found = "/".join(map(str, sorted(widths)))
        raise IpaError(
            f"adapter {path} is for a base model of text width {found}, this one has {dimensions.text_width} "
            "(768: Stable Diffusion 1.x, 1024: 2.x, 2048: XL); use an adapter made for this base model"
        )
    names = [f"{2 * index + 1}.to_{which}_ip.weight" for index in range(len(layout.layers)) for which in "kv"]
    if len(layers) != len(names):
        raise IpaError(
            f"adapter {path} has {len(layers) // 2} cross-attention layers, this base model has {len(names) // 2}; "
            "use an adapter made for this base model"
        )
    _expect_keys(path, "ip_adapter", set(layers), set(names))
    _expect_shapes(path, layers, {name: (layout.widths[i // 2], dimensions.text_width) for i, name in enumerate(names)})
    out_features, embed_width = projection["proj.weight"].shape
    if embed_width != dimensions.image_embed_width:
        raise IpaError(
            f"adapter {path} was trained with an image encoder of embedding width {embed_width}, this one has "
            f"{dimensions.image_embed_width}; pass the adapter's own with --image-encoder "
            "(1024: ViT-H/14, 1280: ViT-bigG/14)"
        )
    width = dimensions.text_width
    tokens = max(1, out_features // width)
    _expect_shapes(
        path,
        projection,
        {
            "proj.weight": (tokens * width, embed_width),
            "proj.bias": (tokens * width,),
            "norm.weight": (width,),
            "norm.bias": (width,),
        },
    )
    return AdapterWeights(
        kind=BASE,
        tokens=tokens,
        feature="image_embeds",
        projection=projection,
        keys_values=tuple(layers[name] for name in names),
        source_sha256=hash_file(path),
    )


def adapter_graph(name: str, weights: AdapterWeights, dimensions: Dimensions, dtype: str) -> Graph:
    """The adapter's graph, ready for export."""
    spec = adapter_spec(weights.feature).resolved({**dimensions.sizes(), "tokens": weights.tokens}, dtype)
    module = BaseAdapter(weights)
    return Graph(f"ip_adapter/{name}", to_half(module) if dtype == "float16" else module, spec)


def _group(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _expect_keys(path: Path, group: str, found: set[str], expected: set[str]) -> None:
    for what, names in (("misses", expected - found), ("has the unknown", found - expected)):
        if names:
            raise IpaError(f"adapter {path} {what} {group}.{min(names)}; the file is incomplete or of another kind")


def _expect_shapes(path: Path, state: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise IpaError(
                f"adapter {path}: {name} is {tuple(state[name].shape)}, this base model wants {shape}; "
                "use an adapter made for this base model"
            )
