"""A bundle is refused, with one message, whenever a file is not what the manifest says or leads elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from text_kv_bundle import KV, WIDTH, linear_model, write_bundle

from ipa.engines.bundle import Bundle
from ipa.engines.errors import BundleError, EngineError, RequestError
from ipa.engines.manifest import (
    Manifest,
)
from ipa.engines.onnx_file import ExternalData, external_data
from ipa.engines.registry import ENGINE_NAMES


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


def test_a_manifest_survives_its_own_json(root: Path) -> None:
    manifest = Bundle.open(root).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest
