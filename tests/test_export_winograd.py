"""Winograd's algorithm in place of 3x3 convolutions: the same numbers, chosen where it pays, only for onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from tiny import tiny_pipeline

from ipa.engines.bundle import Bundle
from ipa.engines.errors import BundleError
from ipa.export.build import ExportRequest, export_bundle
from ipa.export.inspect import as_text
from ipa.export.winograd import DOMAIN, Convolution, best_tile, transforms, winograd_graph

SIZES = {"batch": 2, "tokens": 4, "latent_height": 16, "latent_width": 16, "height": 128, "width": 128}
PLAIN: Mapping[str, Any] = {"pads": [1, 1, 1, 1]}


def convolution(
    dtype: type = np.float32,
    kernel: tuple[int, int] = (3, 3),
    with_bias: bool = True,
    attributes: Mapping[str, Any] = PLAIN,
    groups: int = 1,
) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((6, 8 // groups, *kernel)) / 8).astype(dtype)
    names = ["x", "weight", "bias"] if with_bias else ["x", "weight"]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        [helper.make_node("Conv", names, ["y"], **attributes, **({"group": groups} if groups > 1 else {}))],
        "convolution",
        [helper.make_tensor_value_info("x", kind, ["batch", 8, "latent_height", "latent_width"])],
        [helper.make_tensor_value_info("y", kind, ["batch", 6, "y_height", "y_width"])],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(rng.standard_normal(6).astype(dtype), "bias"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def run(model: onnx.ModelProto, **inputs: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, inputs)
    return np.asarray(output)


@pytest.mark.parametrize("tile", [2, 4])
def test_the_transforms_make_a_convolution_of_one_dimension(tile: int) -> None:
    outputs, weights, inputs = transforms(tile)
    values = np.random.default_rng(0).standard_normal(tile + 2)
    kernel = np.array([0.3, -1.2, 0.7])
    found = outputs.T @ ((weights @ kernel) * (inputs @ values))
    assert np.abs(found - np.correlate(values, kernel, "valid")).max() < 1e-12


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("shape", [(1, 8, 8, 8), (3, 8, 5, 9), (2, 8, 1, 2), (2, 8, 12, 20)])
def test_equals_the_convolution_at_every_size(tile: int, shape: tuple[int, ...]) -> None:
    model = convolution()
    fast = winograd_graph(model, SIZES, lambda _: tile)
    assert fast is not None
    onnx.checker.check_model(fast)
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    expected = run(model, x=x)
    found = run(fast, x=x)
    assert found.shape == expected.shape
    # The larger tile's matrices hold numbers up to 6 and 1/15, which costs about one decimal of float32's seven.
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_float16_convolution_is_computed_in_float32() -> None:
    fast = winograd_graph(convolution(np.float16), SIZES, lambda _: 4)
    assert fast is not None
    x = np.random.default_rng(1).standard_normal((2, 8, 12, 12)).astype(np.float16)
    exact = run(winograd_in_float32(), x=x.astype(np.float32))
    found = run(fast, x=x)
    assert found.dtype == np.float16
    assert np.abs(found - exact).max() <= 2**-11 * np.abs(exact).max()  # one rounding of the result


def winograd_in_float32() -> onnx.ModelProto:
    """The convolution of the float16 weights, in float32."""
    half, single = convolution(np.float16), convolution()
    for target, source in zip(single.graph.initializer, half.graph.initializer, strict=True):
        target.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(source).astype(np.float32), source.name))
    return single


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": (1, 1), "attributes": {}},
        {"attributes": {}},
        {"attributes": {**PLAIN, "strides": [2, 2]}},
        {"attributes": {**PLAIN, "dilations": [2, 2]}},
        {"attributes": {"auto_pad": "SAME_UPPER"}},
        {"groups": 2},
        {"with_bias": False},
    ],
)
def test_other_convolutions_stay(options: dict[str, Any]) -> None:
    assert winograd_graph(convolution(**options), SIZES, lambda _: 4) is None


def test_a_tile_is_chosen_where_it_pays() -> None:
    sides = {8: None, 16: 2, 32: 4, 64: 4, 128: 4, 256: None}
    assert {side: best_tile(Convolution(640, 320, side * side)) for side in sides} == sides
    assert best_tile(Convolution(4, 320, 64 * 64)) is None
    assert best_tile(Convolution(320, 4, 64 * 64)) is None


def test_a_whole_unet_gives_the_same_noise(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    model = onnx.load(tiny_bundle / "unet" / "model.onnx")
    fast = winograd_graph(model, SIZES, lambda _: 4)
    assert fast is not None
    replaced = sum(node.domain == DOMAIN for node in fast.graph.node)
    assert replaced > 40  # two in each resnet, one in each upsampler, the first and the last
    rng = np.random.default_rng(0)
    kv = bundle.manifest.kv_layout.size
    inputs = {
        "sample": rng.standard_normal((2, 4, 9, 12)).astype(np.float32),
        "timestep": np.array(501, np.float32),
        "text_kv": rng.standard_normal((2, 77, kv)).astype(np.float32),
        "image_kv": rng.standard_normal((2, 4, kv)).astype(np.float32),
    }
    expected, found = run(model, **inputs), run(fast, **inputs)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.fixture(scope="module")
def wide_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle wide enough for Winograd tiles at the base's own size."""
    folder = tmp_path_factory.mktemp("wide")
    base = tiny_pipeline(folder / "base", widths=(256, 48, 72, 96))
    export_bundle(ExportRequest(str(base), folder / "bundle", image_encoder=str(base / "image_encoder")))
    return folder / "bundle"


def test_only_onnxruntime_gets_the_other_graph(wide_bundle: Path) -> None:
    bundle = Bundle.open(wide_bundle)
    variants = {name: dict(record.variants) for name, record in bundle.manifest.components.items()}
    assert variants.pop("unet").keys() == {"onnxruntime"}
    assert not any(variants.values())
    assert "onnxruntime runs unet/winograd.onnx" in as_text(bundle)

    (wide_bundle / "unet" / "model.onnx").rename(wide_bundle / "unet" / "hidden")
    with bundle.open_component("unet", "onnxruntime") as engine:  # so it is not `model.onnx` that is opened
        rng = np.random.default_rng(0)
        spec = {tensor.name: tensor for tensor in engine.spec.inputs}
        kv = bundle.manifest.kv_layout.size
        assert spec["text_kv"].axes[-1] == kv
        inputs = {
            "sample": rng.standard_normal((2, 4, 16, 16)).astype(np.float32),
            "timestep": np.array(501, np.float32),
            "text_kv": rng.standard_normal((2, 77, kv)).astype(np.float32),
            "image_kv": rng.standard_normal((2, 4, kv)).astype(np.float32),
        }
        found = engine(**inputs)["noise_pred"]
    (wide_bundle / "unet" / "hidden").rename(wide_bundle / "unet" / "model.onnx")
    expected = run(onnx.load(wide_bundle / "unet" / "model.onnx"), **inputs)
    assert 0 < np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_changed_variant_is_refused(wide_bundle: Path) -> None:
    path = wide_bundle / "unet" / "winograd.onnx"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"winograd\.onnx is damaged"):
        Bundle.open(wide_bundle)
    path.write_bytes(content)
    Bundle.open(wide_bundle)


def test_a_variant_may_only_read_the_component_s_data(wide_bundle: Path) -> None:
    bundle = Bundle.open(wide_bundle)
    unet = bundle.manifest.components["unet"]
    changed = replace(bundle.manifest, components={"unet": replace(unet, files=unet.files[:1])})
    (wide_bundle / "manifest.json").rename(wide_bundle / "kept.json")
    (wide_bundle / "manifest.json").write_text(changed.to_json())
    with pytest.raises(BundleError, match="not one of its files"):
        Bundle.open(wide_bundle)
    (wide_bundle / "kept.json").replace(wide_bundle / "manifest.json")
