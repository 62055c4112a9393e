"""The smallest bundle: one component, one matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ipa.engines.bundle import hash_file
from ipa.engines.kv_layout import KVLayer, KVLayout
from ipa.engines.manifest import (
    ComponentRecord,
    Defaults,
    FileRecord,
    ImageProcessorRecord,
    Manifest,
    VaeRecord,
)
from ipa.engines.spec import SPECS

KV = 8
WIDTH = 4


def linear_model(location: str | None = "model.onnx.data", **entry: str) -> onnx.ModelProto:
    """`text_kv = encoder_hidden_states @ weight`, the weight outside the file unless `location` is None."""
    weight = numpy_helper.from_array(np.arange(WIDTH * KV, dtype=np.float32).reshape(WIDTH, KV), "weight")
    if location is not None:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": "0", "length": str(4 * WIDTH * KV), **entry}.items():
            weight.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["encoder_hidden_states", "weight"], ["text_kv"])],
        "text_kv",
        [helper.make_tensor_value_info("encoder_hidden_states", TensorProto.FLOAT, ["batch", 77, WIDTH])],
        [helper.make_tensor_value_info("text_kv", TensorProto.FLOAT, ["batch", 77, KV])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def record(root: Path, path: str) -> FileRecord:
    file = root / path
    return FileRecord(path, file.stat().st_size, hash_file(file))


def write_bundle(root: Path, model: onnx.ModelProto | None = None) -> Manifest:
    """A bundle whose only component is `text_kv`."""
    (root / "text_kv").mkdir(parents=True)
    (root / "text_kv" / "model.onnx").write_bytes((model or linear_model()).SerializeToString())
    weight = np.arange(WIDTH * KV, dtype=np.float32)
    (root / "text_kv" / "model.onnx.data").write_bytes(weight.tobytes())
    for name in ("tokenizer", "scheduler"):
        (root / name).mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text("{}")
    (root / "scheduler" / "scheduler_config.json").write_text("{}")
    spec = SPECS["text_kv"].resolved({"text_tokens": 77, "text_width": WIDTH, "kv": KV}, "float32")
    files = (record(root, "text_kv/model.onnx"), record(root, "text_kv/model.onnx.data"))
    manifest = Manifest(
        family="sd15",
        created_by={"ipa-runtime": "0"},
        kv_layout=KVLayout((KVLayer("down", KV // 2),)),
        components={"text_kv": ComponentRecord(files, "float32", spec)},
        adapters={},
        tokenizer=record(root, "tokenizer/tokenizer.json"),
        scheduler=record(root, "scheduler/scheduler_config.json"),
        text_tokens=77,
        vae=VaeRecord(0.18215, 8),
        image_processor=ImageProcessorRecord(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        defaults=Defaults(512, 512),
    )
    (root / "manifest.json").write_text(manifest.to_json())
    return manifest
