"""One PyTorch module to one ONNX file: traced, cleaned, checked against the spec, the same bytes every time.

The tracer is the TorchScript-based one (`dynamo=False`). Measured on a UNet of SD1.5's topology, it takes 5 s where
`dynamo=True` takes 70 s, with equal numbers (1.5e-6 from PyTorch at every size tried); one small adapter takes 0.3 s
and not 20 s. All that depends on the choice is in this file.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from ipa.engines.errors import IpaError
from ipa.engines.spec import ComponentSpec, TensorSpec, axis_size
from ipa.export.attention_function import define_attention, expanded

MODEL_FILE = "model.onnx"
_EXTERNAL_FROM = 1024  # bytes; smaller tensors, shapes among them, stay in the graph
_INLINE_LIMIT = 2**20  # bytes of weights up to which a graph is one file

_TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "int64": torch.int64}
_ONNX_DTYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "int64": onnx.TensorProto.INT64,
}
# Sizes of the free axes in the example inputs. No multiple of 4 among the latent sizes: diffusers asks in Python for
# multiples of 8 (of 4 in SDXL, whose UNet has one level less), and only the other branch is right for every size.
# Small, because a float16 model is traced on the CPU, which has slow kernels for it.
EXAMPLE_SIZES: Mapping[str, int] = {
    "batch": 2,
    "tokens": 5,
    "latent_height": 10,
    "latent_width": 22,
    "height": 32,
    "width": 48,
}


@dataclass(frozen=True)
class Graph:
    """What is exported: a module whose `forward` takes and gives the tensors of `spec`, in order."""

    name: str  # for messages
    module: nn.Module
    spec: ComponentSpec
    sizes: Mapping[str, int] = field(default_factory=dict)  # in place of some of `EXAMPLE_SIZES`


def export_graph(graph: Graph, path: Path, opset: int, standard: bool = False) -> tuple[Path, ...]:
    """Trace a module and write it; large weights go to one file beside it, named `<path>.data`.

    Args:
        graph: module and spec.
        path: of the graph; its folder is made when missing.
        standard: use operators of the ONNX standard alone, see `ipa.export.attention_function`.
        opset: 18 to 20. From 23 on attention is one node, which TensorRT-RTX 1.7 crashes on.
    Returns:
        The files written, the graph first.
    Raises:
        IpaError: the exporter failed, or what it made differs from the spec.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    model = _trace(graph, path.parent, opset)
    _fit_to_spec(graph.name, model, graph.spec)
    _strip(model)
    define_attention(model)
    if standard:
        model = expanded(model)
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) <= _INLINE_LIMIT:
        onnx.save_model(model, path)
        return (path,)
    data = path.with_name(f"{path.name}.data")
    onnx.save_model(
        model,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=data.name,
        size_threshold=_EXTERNAL_FROM,
    )
    data.chmod(path.stat().st_mode)  # onnx makes it readable by its owner only
    return (path, data)


def example(tensor: TensorSpec, sizes: Mapping[str, int]) -> Tensor:
    """An input to trace with."""
    shape = [axis_size(axis, {**EXAMPLE_SIZES, **sizes}) for axis in tensor.axes]
    return torch.ones(shape, dtype=_TORCH_DTYPES[tensor.dtype])


def _trace(graph: Graph, folder: Path, opset: int) -> Any:
    """The traced model, weights included; `folder` has room for them."""
    tensors = (*graph.spec.inputs, *graph.spec.outputs)
    free = {
        tensor.name: {index: axis for index, axis in enumerate(tensor.axes) if isinstance(axis, str)}
        for tensor in tensors
    }
    # Above 2 GiB the exporter writes one file per weight.
    with tempfile.TemporaryDirectory(prefix=".trace-", dir=folder) as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(scratch) / MODEL_FILE
        try:
            torch.onnx.export(
                graph.module.eval(),
                tuple(example(tensor, graph.sizes) for tensor in graph.spec.inputs),
                os.fspath(file),  # a `Path` is taken for a buffer, which ends at 2 GiB
                dynamo=False,
                opset_version=opset,
                input_names=[tensor.name for tensor in graph.spec.inputs],
                output_names=[tensor.name for tensor in graph.spec.outputs],
                dynamic_axes=free,
            )
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise IpaError(f"{graph.name}: PyTorch {torch.__version__} cannot export this model: {reason}") from error
        return onnx.load(file)


def _fit_to_spec(name: str, model: Any, spec: ComponentSpec) -> None:
    """Check names, order, dtypes and ranks; write the spec's axes where tracing lost a fixed size of an output."""
    for values, tensors in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
        found = [(value.name, value.type.tensor_type.elem_type, _rank(value)) for value in values]
        expected = [(tensor.name, _ONNX_DTYPES[tensor.dtype], len(tensor.axes)) for tensor in tensors]
        if found != expected:
            raise IpaError(f"{name}: the exporter made {found}, expected {expected}")
        for value, tensor in zip(values, tensors, strict=True):
            for axis, dimension in zip(tensor.axes, value.type.tensor_type.shape.dim, strict=True):
                if dimension.HasField("dim_value") and dimension.dim_value != axis:
                    raise IpaError(f"{name}: {tensor.name} has a size of {dimension.dim_value}, expected {tensor}")
                if isinstance(axis, int):
                    dimension.dim_value = axis
                else:
                    dimension.dim_param = axis


def _rank(value: Any) -> int:
    return len(value.type.tensor_type.shape.dim)


def _strip(model: Any) -> None:
    """Drop what is not the model: doc strings and metadata (local paths, stack traces), shapes of inner tensors."""
    for item in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    del model.graph.value_info[:]
