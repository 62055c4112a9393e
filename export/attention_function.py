"""Attention as one node with a definition: engines that have a kernel for it use it, for others it is expanded.

The node is `com.microsoft.MultiHeadAttention`, and the graph carries a function of that name, of standard operators.
onnxruntime and OpenVINO have tiled kernels for it, which never write the matrix of scores to memory. `expanded` puts
the definition in the nodes' place: MatMul, Softmax, MatMul, the pattern that TensorRT fuses. TensorRT-RTX 1.7.1 parses
the function by itself, but mixes up its calls: it crashes when it builds a UNet from such a graph.
"""

from __future__ import annotations

from typing import Any

from onnx import AttributeProto, FunctionProto, NodeProto, helper, inliner

DOMAIN, OPERATOR = "com.microsoft", "MultiHeadAttention"


def define_attention(model: Any) -> None:
    """Give a graph that has such nodes the function that defines them."""
    if not any(node.domain == DOMAIN for node in model.graph.node):
        return
    opset = next(entry for entry in model.opset_import if not entry.domain)
    if not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    model.functions.append(_definition(opset.version))


def expanded(model: Any) -> Any:
    """A graph of standard operators alone; the weights move over from `model`, or stay outside in their files."""
    weights = {}
    for tensor in model.graph.initializer:  # put aside: the inliner takes and gives messages, which end at 2 GiB
        if tensor.HasField("raw_data"):
            weights[tensor.name] = tensor.raw_data
            tensor.ClearField("raw_data")
    model = inliner.inline_local_functions(model)
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.raw_data = weights.pop(tensor.name)
    for entry in [entry for entry in model.opset_import if entry.domain == DOMAIN]:
        model.opset_import.remove(entry)
    return model


def _definition(opset: int) -> FunctionProto:
    """The operator out of standard ones."""
    nodes = [
        _attribute("num_heads", "value_int", AttributeProto.INT),
        _attribute("scale", "value_float", AttributeProto.FLOAT),
        helper.make_node("Constant", [], ["first"], value_ints=[0]),
        helper.make_node("Constant", [], ["kept"], value_ints=[0, 0]),
        helper.make_node("Constant", [], ["rest"], value_ints=[-1]),
        helper.make_node("Unsqueeze", ["num_heads", "first"], ["heads"]),
        helper.make_node("Concat", ["kept", "heads", "rest"], ["split"], axis=0),
        helper.make_node("Concat", ["kept", "rest"], ["joined"], axis=0),
        helper.make_node("CastLike", ["scale", "query"], ["factor"]),
        helper.make_node("Mul", ["query", "factor"], ["scaled"]),
    ]
    for source, name, order in (
        ("scaled", "q", (0, 2, 1, 3)),
        ("key", "k", (0, 2, 3, 1)),
        ("value", "v", (0, 2, 1, 3)),
    ):
        nodes.append(helper.make_node("Reshape", [source, "split"], [f"{name}_split"]))
        nodes.append(helper.make_node("Transpose", [f"{name}_split"], [name], perm=order))
    nodes += [
        helper.make_node("MatMul", ["q", "k"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["by_head"]),
        helper.make_node("Transpose", ["by_head"], ["by_position"], perm=(0, 2, 1, 3)),
        helper.make_node("Reshape", ["by_position", "joined"], ["output"]),
    ]
    return helper.make_function(
        DOMAIN,
        OPERATOR,
        ["query", "key", "value"],
        ["output"],
        nodes,
        [helper.make_opsetid("", opset)],
        attributes=["num_heads", "scale"],
    )


def _attribute(name: str, field: str, kind: AttributeProto.AttributeType.ValueType) -> NodeProto:
    """An attribute of the operator as a constant."""
    node = helper.make_node("Constant", [], [name])
    node.attribute.append(AttributeProto(name=field, ref_attr_name=name, type=kind))
    return node
