"""Attention as one node: what it is defined as, and that every way to compute it agrees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention, AttnProcessor
from onnx import inliner

from ipa.engines.bundle import Bundle
from ipa.export.attention import SpatialAttention, attend
from ipa.export.attention_function import DOMAIN, OPERATOR, expanded
from ipa.export.cases import cases


def attention_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == DOMAIN]


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_every_attention_of_unet_and_vae_is_one_node(tiny_bundle: Path, tiny_base: Path) -> None:
    layers = len(Bundle.open(tiny_bundle, verify=False).manifest.kv_layout.layers)
    for component, expected in (("unet", 3 * layers), ("vae_decoder", 1), ("vae_encoder", 1)):
        model = onnx.load(tiny_bundle / component / "model.onnx", load_external_data=False)
        assert [node.op_type for node in attention_nodes(model)] == [OPERATOR] * expected, component
        assert [(function.domain, function.name) for function in model.functions] == [(DOMAIN, OPERATOR)]
        assert "Softmax" not in {node.op_type for node in model.graph.node}, component


@pytest.mark.parametrize("component", ["unet", "vae_decoder"])
def test_the_definition_agrees_with_the_kernel(tiny_bundle: Path, component: str) -> None:
    model = onnx.load(tiny_bundle / component / "model.onnx")
    standard = expanded(onnx.load(tiny_bundle / component / "model.onnx"))
    onnx.checker.check_model(standard)
    assert {entry.domain for entry in standard.opset_import} == {""}
    assert not standard.functions
    assert "Softmax" in {node.op_type for node in standard.graph.node}
    spec = Bundle.open(tiny_bundle, verify=False).manifest.components[component].spec
    kernel, definition = session(model), session(standard)
    for case, inputs in cases(spec, 8, 1000):
        expected, found = kernel.run(None, inputs)[0], definition.run(None, inputs)[0]
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.ptp(expected), err_msg=case)


def test_weights_are_put_aside_while_it_is_expanded(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At full size they are more than the 2 GiB that a message may have."""
    sizes, inline = [], inliner.inline_local_functions

    def counted(model: onnx.ModelProto) -> onnx.ModelProto:
        sizes.append(sum(len(tensor.raw_data) for tensor in model.graph.initializer))
        return inline(model)

    monkeypatch.setattr(inliner, "inline_local_functions", counted)
    original = onnx.load(tiny_bundle / "unet" / "model.onnx")
    standard = expanded(onnx.load(tiny_bundle / "unet" / "model.onnx"))
    assert sizes == [0]
    assert list(standard.graph.initializer) == list(original.graph.initializer)


def test_onnxruntime_runs_its_own_kernel(tiny_bundle: Path, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(tiny_bundle / "unet" / "model.onnx", options, providers=["CPUExecutionProvider"])
    before = onnx.load(tiny_bundle / "unet" / "model.onnx", load_external_data=False)
    after = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    assert len(attention_nodes(before)) == sum(node.op_type == OPERATOR for node in after.graph.node)
    assert "Softmax" not in {node.op_type for node in after.graph.node}


@pytest.mark.parametrize("upcast", [False, True])
def test_attend_is_softmax_of_scaled_products(upcast: bool) -> None:
    torch.manual_seed(0)
    layer = Attention(query_dim=24, heads=3, dim_head=8, upcast_attention=upcast)
    query, key, value = torch.randn(2, 10, 24), torch.randn(2, 7, 24), torch.randn(2, 7, 24)
    by_head = [x.reshape(2, -1, 3, 8).transpose(1, 2) for x in (query, key, value)]
    weights = (by_head[0] @ by_head[1].mT / 8**0.5).softmax(-1)
    expected = (weights @ by_head[2]).transpose(1, 2).reshape(2, 10, 24)
    torch.testing.assert_close(attend(layer, query, key, value), expected, atol=1e-6, rtol=1e-5)


def test_scores_are_in_float32_where_the_model_asks_for_it() -> None:
    layer = Attention(query_dim=8, heads=1, dim_head=8, upcast_attention=True)
    query = torch.full((1, 2, 8), 200.0, dtype=torch.float16)  # products of 320,000: infinite in half precision
    result = attend(layer, query, query, query)
    assert result.dtype == torch.float16
    torch.testing.assert_close(result, query)


def test_spatial_attention_equals_diffusers(tiny_base: Path) -> None:
    torch.manual_seed(0)
    layer = AutoencoderKL.from_pretrained(tiny_base / "vae").decoder.mid_block.attentions[0]
    features = torch.randn(2, layer.to_q.in_features, 5, 7)
    with torch.no_grad():
        layer.set_processor(AttnProcessor())
        expected = layer(features)
        layer.set_processor(SpatialAttention())
        torch.testing.assert_close(layer(features), expected, atol=1e-6, rtol=1e-5)
