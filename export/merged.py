"""One ONNX file for users who deploy a single file: the denoising step with one adapter inside."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import permutations
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


def check_merged(file: Path, output: Path, sources: Sequence[Path], force: bool) -> None:
    """Refuse a file that would end up where something else belongs, before the minutes of work start.

    Args:
        output: the bundle that is written, too.
        sources: files and folders that are read.
        force: replace what is there.
    Raises:
        BundleError: says what is there.
    """
    if any(one.is_relative_to(other) for one, other in permutations((file.resolve(), output.resolve()), 2)):
        raise BundleError(f"--merged {file} and --output {output} lie in each other; name a file outside the bundle")
    for path in filter(Path.exists, _paths(file.parent, file.name)):
        if any(path.resolve().is_relative_to(source.resolve()) for source in sources):
            raise BundleError(f"--merged {file} would replace {path}, which is read; name another file")
        if not force:
            raise BundleError(f"--merged {file} would replace {path}; allow it with --force, or name another file")


@contextmanager
def staged_merged(options: MergedOptions | None) -> Iterator[Path]:
    """A temporary folder, whose files are put beside `options.file` when the block ends well, `FILE.meta.json` last.

    Raises:
        BundleError: the files could not be written.
    """
    if options is None:
        yield Path()
        return
    name, parent = options.file.name, options.file.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=parent) as staging:
            yield Path(staging)
            sync_tree(Path(staging))
            for path in filter(Path.exists, _paths(Path(staging), name)):
                path.replace(parent / path.name)
    except OSError as error:
        raise _failed(options, error) from error


def export_merged(
    options: MergedOptions,
    folder: Path,
    unet: nn.Module,
    text_kv: nn.Module,
    adapter_name: str,
    weights: AdapterWeights,
    dimensions: Dimensions,
    dtype: str,
    opset: int,
    family: str = SD15,
) -> None:
    """Write the graph, its data (`FILE.data`, when large) and `FILE.meta.json`.

    Args:
        folder: of `staged_merged`.
        unet: a `HoistedUNet`, in `dtype` already.
        text_kv: the packed `to_k`/`to_v` of the same UNet, in `dtype` already.
    Raises:
        IpaError: the exporter failed or the files could not be written.
    """
    adapter = weights.scaled(options.scale).module()
    spec = merged_spec(weights, dimensions, dtype, family)
    module = MergedStep(unet, text_kv, to_half(adapter) if dtype == "float16" else adapter)
    try:
        graph, name = Graph(options.file.name, module, spec), options.file.name
        files = export_graph(graph, folder / name, opset, standard=True)
        meta = {"format": "ipa-merged-step", "format_version": 1, **asdict(spec), "dtype": dtype, "opset": opset}
        meta["adapter"] = {
            "name": adapter_name,
            "kind": weights.kind.name,
            "tokens": weights.tokens,
            "negative": weights.kind.negative,
            "sha256": weights.source_sha256,
        }
        meta["ip_adapter_scale"] = options.scale
        meta["files"] = [{"path": file.name, "size": file.stat().st_size, "sha256": hash_file(file)} for file in files]
        meta["created_by"] = created_by()
        (folder / f"{name}.meta.json").write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
    except OSError as error:
        raise _failed(options, error) from error


def merged_spec(weights: AdapterWeights, dimensions: Dimensions, dtype: str, family: str = SD15) -> ComponentSpec:
    """Inputs and outputs of the merged graph."""
    sample, timestep = SPECS["unet"].inputs[:2]
    text, image = SPECS["text_kv"].inputs[0], ADAPTER_FEATURES[weights.feature]
    inputs = (sample, timestep, text, image, *added_conditions(family))
    spec = ComponentSpec(inputs, SPECS["unet"].outputs)
    return spec.resolved(dimensions.sizes(), dtype)


def _paths(folder: Path, name: str) -> tuple[Path, ...]:
    """Data, graph, description: each is there before the next speaks of it."""
    return tuple(folder / f"{name}{suffix}" for suffix in (".data", "", ".meta.json"))


def _failed(options: MergedOptions, error: OSError) -> BundleError:
    return BundleError(f"{options.file} could not be written: {error.strerror or error}")
