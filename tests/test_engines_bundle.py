"""A bundle is refused, with one message, whenever a file is not what the manifest says or leads elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ipa.engines.bundle import Bundle, hash_file
from ipa.engines.errors import BundleError, EngineError, RequestError
from ipa.engines.kv_layout import KVLayer, KVLayout
from ipa.engines.manifest import (
    ComponentRecord,
    Defaults,
    FileRecord,
    ImageProcessorRecord,
    Manifest,
    VaeRecord,
)
from ipa.engines.onnx_file import ExternalData, external_data
from ipa.engines.registry import ENGINE_NAMES
from ipa.engines.spec import SPECS, ComponentSpec, TensorSpec

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


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def refusal(root: Path, **options: Any) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(root, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((root / "manifest.json").read_text())
    change(data)
    (root / "manifest.json").write_text(json.dumps(data))


def test_an_intact_bundle_opens_and_computes(root: Path) -> None:
    bundle = Bundle.open(root)
    states = np.random.default_rng(0).standard_normal((2, 77, WIDTH), np.float32)
    with bundle.open_component("text_kv", "onnxruntime") as engine:
        text_kv = engine(encoder_hidden_states=states)["text_kv"]
    weight = np.arange(WIDTH * KV, dtype=np.float32).reshape(WIDTH, KV)
    # Four products summed in float32, of magnitude up to 100: 1e-4 is a few units in the last place.
    np.testing.assert_allclose(text_kv, states @ weight, atol=1e-4)


def test_missing_folder_and_missing_manifest(tmp_path: Path) -> None:
    assert "is not a folder" in refusal(tmp_path / "nowhere")
    assert "has no manifest.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "other"}', "\x00", '{"format": "ipa-bundle"}'])
def test_a_broken_manifest_is_refused(root: Path, text: str) -> None:
    (root / "manifest.json").write_text(text)
    assert "manifest.json" in refusal(root)


def test_manifest_that_is_not_text(root: Path) -> None:
    (root / "manifest.json").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refusal(root)


def test_a_newer_format_says_how_to_upgrade(root: Path) -> None:
    edit(root, lambda data: data.update(format_version=2))
    assert "pip install -U ipa-runtime" in refusal(root)


@pytest.mark.parametrize("key", ["components", "kv_layout", "tokenizer", "defaults", "text_tokens"])
def test_a_missing_or_mistyped_record_is_named(root: Path, key: str) -> None:
    original = (root / "manifest.json").read_text()
    edit(root, lambda data: data.pop(key))
    assert key in refusal(root)
    (root / "manifest.json").write_text(original)
    edit(root, lambda data: data.update({key: True}))
    assert f"manifest.{key}" in refusal(root)


@pytest.mark.parametrize(
    "path",
    ["../x", "/etc/passwd", "a/../../x", "C:\\x", "a\\b", "x\x00y", "", ".", "a//b", "./a", "-rf", ".hidden", "a/"],
)
def test_a_path_that_leaves_the_folder_is_refused_before_anything_is_opened(root: Path, path: str) -> None:
    (root.parent / "x").write_text("secret")
    edit(root, lambda data: data["components"]["text_kv"]["files"][1].update(path=path))
    assert "plain relative path" in refusal(root)


def test_a_link_that_leads_out_is_refused(root: Path) -> None:
    data = root / "text_kv" / "model.onnx.data"
    data.rename(root.parent / "outside")
    data.symlink_to(root.parent / "outside")
    assert "leads out of the bundle" in refusal(root)


def test_the_hub_cache_layout_of_links_works(root: Path) -> None:
    repository = root.parent / "models--user--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    for index, file in enumerate(sorted(path for path in root.rglob("*") if path.is_file())):
        (blobs / str(index)).write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(root)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(index), link.parent))
    assert Bundle.open(snapshot).manifest.family == "sd15"


def test_missing_short_and_long_files_are_refused_by_size(root: Path) -> None:
    data = root / "text_kv" / "model.onnx.data"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    assert f"has {len(content) - 1} bytes, the manifest says {len(content)}" in refusal(root, verify=False)
    data.write_bytes(content + b"0")
    assert "bytes, the manifest says" in refusal(root, verify=False)
    data.unlink()
    assert "is missing" in refusal(root)


def test_every_flipped_byte_is_found(root: Path) -> None:
    for path in sorted(root.rglob("*")):
        if not path.is_file() or path.name == "manifest.json":
            continue
        content = bytearray(path.read_bytes())
        for position in range(0, len(content), max(1, len(content) // 8)):
            content[position] ^= 1
            path.write_bytes(content)
            assert f"{path} is damaged" in refusal(root)
            content[position] ^= 1
        path.write_bytes(content)
    Bundle.open(root)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"location": "../outside"}, "not one of its files"),
        ({"location": "/etc/passwd"}, "not one of its files"),
        ({"location": "other.data"}, "not one of its files"),
        ({"offset": "-4"}, "wants bytes -4"),
        ({"length": str(2**40)}, "wants bytes"),
        ({"length": "-1"}, "wants bytes"),
        ({"offset": "1e3"}, "not a valid ONNX file"),
    ],
)
def test_foreign_external_data_is_refused(tmp_path: Path, entry: dict[str, str], message: str) -> None:
    location = entry.pop("location", "model.onnx.data")
    write_bundle(tmp_path / "bundle", linear_model(location, **entry))
    assert message in refusal(tmp_path / "bundle")


def constant_with_external_data() -> onnx.ModelProto:
    model = linear_model()
    value = model.graph.initializer.pop()
    model.graph.node.insert(0, helper.make_node("Constant", [], ["weight"], value=value))
    return model


def sparse_initializer() -> onnx.ModelProto:
    model = linear_model(None)
    values = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("indices", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))
    return model


@pytest.mark.parametrize("model", [constant_with_external_data, sparse_initializer])
def test_tensors_we_never_write_are_refused(tmp_path: Path, model: Callable[[], onnx.ModelProto]) -> None:
    write_bundle(tmp_path / "bundle", model())
    assert "not a valid ONNX file" in refusal(tmp_path / "bundle")


def test_external_data_in_a_subgraph_is_found(tmp_path: Path) -> None:
    inner = linear_model("elsewhere").graph
    model = linear_model(None)
    model.graph.node.append(helper.make_node("If", ["c"], ["o"], then_branch=inner, else_branch=inner))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert external_data(path) == [ExternalData("elsewhere", 0, 4 * WIDTH * KV)] * 2


@pytest.mark.parametrize("content", [b"", b"\x3a\xff\xff\xff\xff\x0f", b"\x3b", b"\xff" * 20, b"not a model"])
def test_bytes_that_are_no_graph(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="export the bundle again"):
        external_data(path)


def test_unknown_names_list_what_exists(root: Path) -> None:
    bundle = Bundle.open(root)
    with pytest.raises(RequestError, match="it has: none"):
        bundle.adapter("cats")
    with pytest.raises(BundleError, match="no component 'unet'"):
        bundle.open_component("unet", "auto")
    with pytest.raises(EngineError, match=f"expected one of {', '.join(ENGINE_NAMES)}"):
        bundle.open_component("text_kv", "warp")


@pytest.fixture(params=["onnxruntime", "openvino"])
def name(request: pytest.FixtureRequest) -> str:
    """Every back-end that runs here."""
    return str(request.param)


def engine_error(root: Path, name: str, **arrays: Any) -> str:
    with Bundle.open(root).open_component("text_kv", name) as engine, pytest.raises(EngineError) as caught:
        engine(**arrays)
    return str(caught.value)


def test_an_engine_never_converts_silently(root: Path, name: str) -> None:
    states = np.zeros((2, 77, WIDTH), np.float32)
    assert "float64(2, 77, 4), expected float32(batch, 77, 4)" in engine_error(
        root, name, encoder_hidden_states=states.astype(np.float64)
    )
    assert "float32(2, 76, 4)" in engine_error(root, name, encoder_hidden_states=states[:, 1:])
    assert "float32(77, 4)" in engine_error(root, name, encoder_hidden_states=states[0])
    assert "got inputs ['states']" in engine_error(root, name, states=states)


def test_nan_is_an_error_that_names_the_component(root: Path, name: str) -> None:
    states = np.full((1, 77, WIDTH), np.nan, np.float32)
    assert "text_kv: output 'text_kv' holds NaN" in engine_error(root, name, encoder_hidden_states=states)


def test_a_closed_engine_says_so(root: Path, name: str) -> None:
    engine = Bundle.open(root).open_component("text_kv", name)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine(encoder_hidden_states=np.zeros((1, 77, WIDTH), np.float32))


def test_a_graph_that_is_not_the_manifest_s(root: Path, name: str) -> None:
    manifest = Bundle.open(root).manifest
    other = ComponentSpec((TensorSpec("states", ("batch", 77, WIDTH), "float32"),), ())
    graph = replace(manifest.components["text_kv"], spec=other)
    (root / "manifest.json").write_text(replace(manifest, components={"text_kv": graph}).to_json())
    with pytest.raises(EngineError, match="the manifest says"):
        Bundle.open(root).open_component("text_kv", name)


def test_a_manifest_survives_its_own_json(root: Path) -> None:
    manifest = Bundle.open(root).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_a_broken_back_end_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libx.so: cannot open shared object file\nTraceback")

    monkeypatch.setattr("ipa.engines.registry.import_module", broken)
    with pytest.raises(EngineError) as caught:
        Bundle.open(root).open_component("text_kv", "onnxruntime")
    message = str(caught.value)
    assert "the engine 'onnxruntime' cannot be loaded: libx.so: cannot open shared object file; run `pip" in message
    assert "\n" not in message
