"""IP-Adapter files: what kind they are, whether they fit a base model, and the graph made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ipa.engines.bundle import hash_file
from ipa.engines.errors import IpaError
from ipa.engines.kv_layout import KVLayout
from ipa.engines.spec import Dimensions, adapter_spec
from ipa.export.adapter_kinds import Kind, MakeProjection, kind_of
from ipa.export.adapter_modules import Adapter
from ipa.export.adapter_tensors import TensorGroup
from ipa.export.named_files import named
from ipa.export.onnx_export import Graph
from ipa.export.precision import to_half
from ipa.trainer.errors import TrainError
from ipa.trainer.weights import load_adapter


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
        name, path = named(text, Path(text).stem, "adapter")
        return cls(name, Path(path))


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter that fits a base model: image feature -> `tokens` tokens -> keys and values of every layer."""

    kind: Kind
    tokens: int  # per image
    make_projection: MakeProjection
    projection: dict[str, Tensor]  # with the names of the file
    keys_values: tuple[Tensor, ...]  # K_0, V_0, K_1, V_1, ... each (width, text_width)
    source_sha256: str

    @property
    def feature(self) -> str:
        """The image encoder's output that it reads."""
        return self.kind.feature

    def scaled(self, scale: float) -> AdapterWeights:
        """The same adapter with a fixed `ip_adapter_scale`: attention is linear in the values."""
        keys_values = tuple(weight * scale if index % 2 else weight for index, weight in enumerate(self.keys_values))
        return replace(self, keys_values=keys_values)

    def module(self) -> Adapter:
        """A module over these very tensors, with gradients off."""
        with torch.device("meta"):
            projection = self.make_projection()
        projection.load_state_dict(self.projection, assign=True)
        return Adapter(projection, self.keys_values)


def read_adapter(path: Path, layout: KVLayout, dimensions: Dimensions) -> AdapterWeights:
    """Read a `.safetensors` or `.bin` file and check it against a base model.

    Args:
        layout: the cross-attention layers of the base model's UNet.
        dimensions: widths of its text and image encoders.
    Returns:
        The weights in float32.
    Raises:
        IpaError: the file is missing, damaged, unsafe, of a kind that is not supported, or for another model.
    """
    try:
        state = {name: tensor.float() for name, tensor in load_adapter(path).items()}
    except TrainError as error:
        raise IpaError(f"adapter {error}") from error
    return fitted(path, state, hash_file(path), layout, dimensions)


def fitted(
    path: Path, state: Mapping[str, Tensor], sha256: str, layout: KVLayout, dimensions: Dimensions
) -> AdapterWeights:
    """Check an adapter's tensors against a base model; only their names and shapes are looked at.

    Args:
        path: for messages.
        state: flat names to tensors, on the meta device if need be.
        sha256: of the file.
        layout, dimensions: of the base model.
    Raises:
        IpaError: names what does not fit, both sides of it.
    """
    image_proj, ip_adapter = (TensorGroup.of(path, name, state) for name in ("image_proj", "ip_adapter"))
    kind = kind_of(image_proj, ip_adapter)
    names = _check_layers(ip_adapter, layout, dimensions)
    make_projection = kind.projection(image_proj, dimensions)
    with torch.device("meta"):
        tokens = make_projection().tokens
    return AdapterWeights(
        kind=kind,
        tokens=tokens,
        make_projection=make_projection,
        projection=dict(image_proj.tensors),
        keys_values=tuple(ip_adapter.tensors[name] for name in names),
        source_sha256=sha256,
    )


def adapter_graph(name: str, weights: AdapterWeights, dimensions: Dimensions, dtype: str) -> Graph:
    """The adapter's graph, ready for export."""
    spec = adapter_spec(weights.feature).resolved({**dimensions.sizes(), "tokens": weights.tokens}, dtype)
    module = weights.module()
    return Graph(f"ip_adapter/{name}", to_half(module) if dtype == "float16" else module, spec)


def _check_layers(ip_adapter: TensorGroup, layout: KVLayout, dimensions: Dimensions) -> list[str]:
    """Names of K_0, V_0, K_1, V_1, ..., each of the shape that the base model wants."""
    widths = {ip_adapter.shape(name, 2)[1] for name in ip_adapter.tensors}
    if widths != {dimensions.text_width}:
        found = "/".join(map(str, sorted(widths)))
        raise IpaError(
            f"adapter {ip_adapter.path} is for a base model of text width {found}, this one has "
            f"{dimensions.text_width} (768: Stable Diffusion 1.x, 1024: 2.x, 2048: XL); use an adapter made for this "
            "base model"
        )
    names = [f"{2 * index + 1}.to_{which}_ip.weight" for index in range(len(layout.layers)) for which in "kv"]
    if len(ip_adapter.tensors) != len(names):
        raise IpaError(
            f"adapter {ip_adapter.path} has {len(ip_adapter.tensors) // 2} cross-attention layers, this base model has "
            f"{len(names) // 2}; use an adapter made for this base model"
        )
    ip_adapter.expect({name: (layout.widths[i // 2], dimensions.text_width) for i, name in enumerate(names)})
    return names
