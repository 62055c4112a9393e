"""The demo as PyTorch: it is shipped as a bundle alone, and a comparison with diffusers needs its weights.

A pipeline of the same shape with random weights goes through the exporter. Its graphs have the bundle's tensors in the
bundle's order, and their random values say which weight is where: whole, transposed or packed with others.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel

from ipa.engines.bundle import Bundle
from ipa.engines.errors import IpaError
from ipa.engines.spec import ONE_SLOT
from ipa.export.adapters import adapter_graph, read_adapter
from ipa.export.dimensions import base_dimensions
from ipa.export.graphs import component_modules, typed_graph
from ipa.export.onnx_export import MODEL_FILE, export_graph
from ipa.export.pipeline import BasePipeline
from ipa.trainer.demo.files import atomic_folder
from ipa.trainer.demo.models import WIDTH, build_image_encoder, build_text_encoder, build_unet, build_vae
from ipa.trainer.demo.pipeline import save_pipeline
from ipa.trainer.demo.tokenizer import build_tokenizer
from ipa.trainer.model import AdapterModel

ADAPTER_FILE = "ip_adapter.safetensors"
_OPSET = 18  # of `ipa-export onnx`
Array = NDArray[np.float32]
Tensors = Sequence[tuple[str, Array]]


@dataclass(frozen=True)
class _Parts:
    """The demo's networks with the adapter in place, as PyTorch builds them."""

    unet: Any
    text_encoder: Any
    image_encoder: Any
    vae: Any
    adapter: AdapterModel
    tokenizer: Any

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All that is trained, by name; the very tensors."""
        for name in ("text_encoder", "image_encoder", "vae"):
            yield from ((f"{name}.{key}", weight.data) for key, weight in getattr(self, name).named_parameters())
        own = set(map(id, self.adapter.adapter_parameters()))
        yield from (
            (f"unet.{key}", weight.data) for key, weight in self.unet.named_parameters() if id(weight) not in own
        )
        yield from ((f"adapter.{key}", weight.data) for key, weight in self.adapter.named_weights().items())

    def save(self, folder: Path) -> None:
        """Write `folder / "pipeline"` and the adapter's file; the UNet loses the adapter."""
        save_file(
            {key: weight.contiguous() for key, weight in self.adapter.named_weights().items()}, folder / ADAPTER_FILE
        )
        self.adapter.eject()
        save_pipeline(folder / "pipeline", self.vae, self.text_encoder, self.tokenizer, self.unet, self.image_encoder)


def restored_demo(bundle: Bundle, folder: Path) -> tuple[Path, Path]:
    """The demo's weights as a pipeline of diffusers and an IP-Adapter file.

    Args:
        bundle: the demo's.
        folder: for them; what an earlier call made of the same bundle there is kept.
    Returns:
        The pipeline's folder and the adapter's file.
    Raises:
        IpaError: a weight is not to be found in the bundle.
    """
    sums = "".join(graph.sha256 for _, graph in sorted(bundle.manifest.graphs().items()))
    made = folder / hashlib.sha256(sums.encode()).hexdigest()[:16]
    if not made.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_folder(made) as partial:
            restore(bundle, partial)
    return made / "pipeline", made / ADAPTER_FILE


def restore(bundle: Bundle, folder: Path) -> None:
    """Write `pipeline/` and `ip_adapter.safetensors` into a folder. See `restored_demo`."""
    name = bundle.manifest.defaults.adapter
    assert name is not None
    parts = _random_parts(bundle.manifest.adapters[name].tokens)
    with tempfile.TemporaryDirectory(prefix=".random-", dir=folder) as scratch:
        graphs = Path(scratch) / "graphs"
        random = {key: weight.clone() for key, weight in parts.weights()}
        parts.save(Path(scratch))
        dtype = bundle.manifest.components["unet"].dtype
        _export(Path(scratch) / "pipeline", Path(scratch) / ADAPTER_FILE, name, dtype, graphs)
        places = Places()
        for file in sorted(graphs.rglob(MODEL_FILE)):
            component = str(file.parent.relative_to(graphs))
            places.add(component, _tensors(file), _tensors(bundle.graph(component).path))
    parts = _random_parts(bundle.manifest.adapters[name].tokens)
    for key, weight in parts.weights():
        weight.copy_(torch.from_numpy(places.find(key, random[key].numpy())))
    parts.save(folder)


def _random_parts(tokens: int) -> _Parts:
    """Weights that half precision holds exactly, and no two alike."""
    tokenizer = build_tokenizer()
    text_encoder = CLIPTextModel(build_text_encoder(tokenizer).config)
    unet = build_unet()
    parts = _Parts(unet, text_encoder, build_image_encoder(), build_vae(), AdapterModel(unet, WIDTH, tokens), tokenizer)
    generator = torch.Generator().manual_seed(0)
    for _, weight in parts.weights():
        weight.copy_(torch.randn(weight.shape, generator=generator).mul(0.1).half())
    return parts


def _export(pipeline: Path, adapter: Path, name: str, dtype: str, graphs: Path) -> None:
    """Export as the bundle was."""
    base = BasePipeline(str(pipeline))
    dimensions = base_dimensions(base)
    for component, module in component_modules(base, ONE_SLOT):
        graph = typed_graph(component, module, dimensions, dtype, base.family)
        export_graph(graph, graphs / component / MODEL_FILE, _OPSET)
    weights = read_adapter(adapter, base.kv_layout, dimensions)
    export_graph(adapter_graph(name, weights, dimensions, dtype), graphs / "ip_adapter" / name / MODEL_FILE, _OPSET)


def _tensors(file: Path) -> list[tuple[str, Array]]:
    """A graph's weights in its order, by name."""
    return [
        (tensor.name, numpy_helper.to_array(tensor).astype(np.float32)) for tensor in onnx.load(file).graph.initializer
    ]


def _is_same(first: str, second: str) -> bool:
    """Whether two names are one, apart from the modules around it."""
    return first == second or first.endswith(f".{second}") or second.endswith(f".{first}")


class Places:
    """Where each weight is, found by its random values."""

    def __init__(self) -> None:
        self._whole: dict[bytes, Array] = {}
        self._columns: dict[bytes, tuple[Array, Array, int]] = {}

    def add(self, component: str, random: Tensors, shipped: Tensors) -> None:
        """Learn of a component's tensors with random and with shipped values.

        Raises:
            IpaError: they are not the same tensors.
        """
        shapes, expected = ([(name, array.shape) for name, array in held] for held in (random, shipped))
        pairs = zip_longest(shapes, expected, fillvalue=("nothing", ()))
        for ours, theirs in pairs:
            if ours[1] != theirs[1] or not _is_same(ours[0], theirs[0]):
                raise IpaError(
                    f"demo: {component} of the bundle has {theirs[0]} {theirs[1]} where the networks of "
                    f"ipa.trainer.demo.models have {ours[0]} {ours[1]}; export the demo again with these versions"
                )
        for (_, values), (_, wanted) in zip(random, shipped, strict=True):
            self._whole[values.tobytes()] = wanted
            for held, its in ((values, wanted), (values.T, wanted.T)) if values.ndim == 2 else ():
                for index in range(held.shape[1]):
                    self._columns[held[:, index].tobytes()] = (held, its, index)

    def find(self, name: str, random: Array) -> Array:
        """The shipped values of the weight that has these random ones.

        Raises:
            IpaError: no tensor has them.
        """
        if random.tobytes() in self._whole:
            return self._whole[random.tobytes()].reshape(random.shape).copy()
        if random.ndim == 2 and random[0].tobytes() in self._columns:
            held, wanted, first = self._columns[random[0].tobytes()]
            place = slice(first, first + len(random))
            if np.array_equal(held[:, place].T, random):
                return wanted[:, place].T.copy()
        raise IpaError(
            f"demo: the weight {name} {random.shape} is not to be found in the bundle; export the demo again"
        )
