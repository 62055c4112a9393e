"""One ONNX file for users who deploy a single file: the denoising step with one adapter inside."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from ipa.engines.bundle import hash_file
from ipa.engines.errors import BundleError
from ipa.engines.spec import ADAPTER_FEATURES, SD15, SPECS, ComponentSpec, Dimensions, added_conditions
from ipa.export.adapters import AdapterWeights
from ipa.export.onnx_export import Graph, export_graph
from ipa.export.precision import to_half
from ipa.export.publish import sync_tree
from ipa.export.versions import created_by


@dataclass(frozen=True)
class MergedOptions:
    """Where the single graph goes, and the `ip_adapter_scale` that is fixed in it."""

    file: Path
    scale: float = 1.0


class MergedStep(nn.Module):
    """`noise_pred = f(sample, timestep, encoder_hidden_states, feature)`; the adapter's kind says which feature.

    Stable Diffusion XL's takes `text_embeds` and `time_ids`, too.
    """

    def __init__(self, unet: nn.Module, text_kv: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_kv, self.adapter = unet, text_kv, adapter

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, feature: Tensor, *added: Tensor
    ) -> Tensor:
        """Predict the noise with keys and values computed in the graph."""
        text_kv, image_kv = self.text_kv(encoder_hidden_states), self.adapter(feature)
        return cast(Tensor, self.unet(sample, timestep, text_kv, *added, image_kv))


def export_merged(
    options: MergedOptions,
    unet: nn.Module,
    text_kv: nn.Module,
    weights: AdapterWeights,
    dimensions: Dimensions,
    dtype: str,
    opset: int,
    family: str = SD15,
) -> None:
    """Write the graph, its data (`FILE.data`, when large) and `FILE.meta.json`, which comes last.

    Args:
        unet: a `HoistedUNet`, in `dtype` already.
        text_kv: the packed `to_k`/`to_v` of the same UNet, in `dtype` already.
    Raises:
        IpaError: the exporter failed or the files could not be written.
    """
    adapter = weights.scaled(options.scale).module()
    spec = merged_spec(weights, dimensions, dtype, family)
    module = MergedStep(unet, text_kv, to_half(adapter) if dtype == "float16" else adapter)
    try:
        options.file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{options.file.name}.", dir=options.file.parent) as folder:
            graph = Graph(options.file.name, module, spec)
            files = export_graph(graph, Path(folder) / options.file.name, opset, standard=True)
            meta = Path(folder) / f"{options.file.name}.meta.json"
            meta.write_text(json.dumps(_meta(options, weights, spec, dtype, opset, files), indent=1) + "\n", "utf-8")
            sync_tree(Path(folder))
            for path in (*reversed(files), meta):
                path.replace(options.file.parent / path.name)
    except OSError as error:
        raise BundleError(f"{options.file} could not be written: {error.strerror or error}") from error


def merged_spec(weights: AdapterWeights, dimensions: Dimensions, dtype: str, family: str = SD15) -> ComponentSpec:
    """Inputs and outputs of the merged graph."""
    sample, timestep = SPECS["unet"].inputs[:2]
    text, image = SPECS["text_kv"].inputs[0], ADAPTER_FEATURES[weights.feature]
    inputs = (sample, timestep, text, image, *added_conditions(family))
    spec = ComponentSpec(inputs, SPECS["unet"].outputs)
    return spec.resolved(dimensions.sizes(), dtype)


def _meta(
    options: MergedOptions,
    weights: AdapterWeights,
    spec: ComponentSpec,
    dtype: str,
    opset: int,
    files: tuple[Path, ...],
) -> dict[str, object]:
    return {
        "format": "ipa-merged-step",
        "format_version": 1,
        **asdict(spec),
        "dtype": dtype,
        "opset": opset,
        "adapter": {
            "kind": weights.kind.name,
            "tokens": weights.tokens,
            "negative": weights.kind.negative,
            "sha256": weights.source_sha256,
        },
        "ip_adapter_scale": options.scale,
        "files": [{"path": path.name, "size": path.stat().st_size, "sha256": hash_file(path)} for path in files],
        "created_by": created_by(),
    }
