"""Which nodes of a UNet are the image prompt's, and what share of a step they take."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from ipa.benchmarks.image_nodes import image_nodes, main, profile
from ipa.benchmarks.random_inputs import random_inputs
from ipa.engines.bundle import Bundle
from ipa.engines.errors import IpaError

FREE = {"batch": 2, "latent_height": 8, "latent_width": 8, "tokens": 4}


def without(model: onnx.ModelProto, names: set[str]) -> onnx.ModelProto:
    """The graph without some nodes; a sum passes on what it had from elsewhere."""
    removed = [node for node in model.graph.node if node.name in names]
    made = {output for node in removed for output in node.output}
    passed = {}
    for node in removed:
        model.graph.node.remove(node)
        if node.op_type == "Add":
            (other,) = set(node.input) - made
            passed[node.output[0]] = other
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = passed.get(name, name)
    return model


def run(file: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    known = {entry.name for entry in session.get_inputs()}
    return np.asarray(session.run(None, {name: value for name, value in inputs.items() if name in known})[0])


def test_without_them_the_unet_is_the_one_without_image_prompt(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle, verify=False)
    graph = bundle.graph("unet")
    model = onnx.load(graph.path)
    nodes = image_nodes(model)
    assert list(nodes.values()).count("MultiHeadAttention") == len(bundle.manifest.kv_layout.layers)
    inputs = random_inputs(graph.spec, FREE, np.random.default_rng(0))
    cut = without(model, set(nodes))
    image_inputs = [entry for entry in cut.graph.input if entry.name.startswith("image_kv")]
    for entry in image_inputs:
        cut.graph.input.remove(entry)
    onnx.save(cut, tmp_path / "cut.onnx")
    zeros = {name: np.zeros_like(value) if name.startswith("image_kv") else value for name, value in inputs.items()}
    found = run(tmp_path / "cut.onnx", inputs)
    np.testing.assert_array_equal(found, run(graph.path, zeros))
    assert np.abs(found - run(graph.path, inputs)).max() > 1e-3


def test_the_command_tells_their_share(tiny_bundle: Path) -> None:
    result = CliRunner().invoke(main, ["--bundle", str(tiny_bundle), "--runs", "3"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    share = found["share_of_the_image_prompt"]
    assert 0 < share["low"] <= share["value"] <= share["high"] < 0.5 and share["count"] == 3
    assert found["step_seconds"]["value"] > 0 and found["nodes"] > 2


def masked_sum() -> onnx.ModelProto:
    shape = ["batch", 4, 8]
    nodes = [
        helper.make_node("Relu", ["sample"], ["query"], "query"),
        helper.make_node("Split", ["image_kv_0"], ["key", "value"], "split", axis=-1, num_outputs=2),
        helper.make_node(
            "MultiHeadAttention", ["query", "key", "value"], ["raw"], "shown", domain="com.microsoft", num_heads=2
        ),
        helper.make_node("Mul", ["raw", "image_mask_0"], ["weighed"], "weigh"),
        helper.make_node("Add", ["query", "weighed"], ["sum"], "sum"),
        helper.make_node("Neg", ["sum"], ["noise_pred"], "after"),
    ]
    tensors = {"sample": shape, "image_kv_0": ["batch", "tokens", 16], "image_mask_0": ["batch", 4, 1]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name, axes in tensors.items()]
    output = helper.make_tensor_value_info("noise_pred", TensorProto.FLOAT, shape)
    return helper.make_model(helper.make_graph(nodes, "g", inputs, [output]))


def test_masks_are_part_of_it_and_what_comes_after_the_sum_is_not() -> None:
    assert list(image_nodes(masked_sum())) == ["split", "shown", "weigh", "sum"]


def test_nodes_without_a_time_of_their_own_are_told(tiny_bundle: Path) -> None:
    graph = Bundle.open(tiny_bundle, verify=False).graph("unet")
    with pytest.raises(IpaError, match="onnxruntime has no times of gone"):
        profile(graph.path, graph.spec, FREE, {"gone": "Add", "left out": "Cast"}, 1)
