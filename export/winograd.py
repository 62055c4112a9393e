"""A second graph of the UNet for onnxruntime on a CPU: its 3x3 convolutions with fewer multiplications.

Winograd's algorithm makes a tile of m x m outputs of a 3x3 convolution with (m + 2)^2 instead of 9 m^2
multiplications for each pair of channels: 4 or 2.25 times fewer. onnxruntime has no such kernel on x86, but the
algorithm is a handful of matrix products, which it runs at full speed. So the graph says it in standard operators: each
chosen `Conv` becomes a call of a function that this file defines. Weights are those of `model.onnx`, in the same file;
onnxruntime transforms them once, when it loads the graph.

Source: Lavin and Gray, arXiv:1509.09308, section 4; the points of the larger tile: arXiv:1803.10986, table 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import FunctionProto, ModelProto, NodeProto, helper, numpy_helper, parser, shape_inference

from ipa.engines.spec import axis_size

ENGINE = "onnxruntime"
FILE = "winograd.onnx"
DOMAIN = "ipa.winograd"
_POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 1.0, -1.0, 2.0, -0.5)}
_CHANNELS = 256  # with fewer, moving the tiles costs more than the multiplications that it saves
_POSITIONS = {4: 32 * 32, 2: 16 * 16}  # the least for each tile
_MOST_POSITIONS = 128 * 128  # of larger pictures the tiles take more memory than the time is worth


@dataclass(frozen=True)
class Convolution:
    """What the choice of a tile depends on: channels in and out, height x width of the picture."""

    channels_in: int
    channels_out: int
    positions: int


def best_tile(convolution: Convolution) -> int | None:
    """The side of the tile for a convolution, `None` to leave it as it is.

    Measured on two cores, a guidance pair, against onnxruntime's own kernel: 1.7 to 2.4 times faster at 64x64 and
    32x32 with tiles of 4; at 16x16 1.5 to 1.8 times with tiles of 2, which need 1.8 times the memory of the weights and
    not 4 times. At 8x8 are the most weights and the least work: they are left alone, for their memory.
    """
    channels, positions = min(convolution.channels_in, convolution.channels_out), convolution.positions
    if channels < _CHANNELS or positions > _MOST_POSITIONS:
        return None
    return next((tile for tile, least in _POSITIONS.items() if positions >= least), None)


def guidance_pair_sizes(height: int, width: int, downscale: int) -> dict[str, int]:
    """The free axes of the spec table for one picture with guidance."""
    latents = {"latent_height": height // downscale, "latent_width": width // downscale}
    return {"batch": 2, "tokens": 4, "height": height, "width": width, **latents}


def write_winograd_graph(path: Path, sizes: Mapping[str, int]) -> Path | None:
    """Write `winograd.onnx` beside a graph with external data, if any of its convolutions gains; its path.

    Args:
        path: `model.onnx`.
        sizes: see `winograd_graph`.
    """
    model = winograd_graph(onnx.load(path, load_external_data=False), sizes)
    if model is None:
        return None
    onnx.save_model(model, path.with_name(FILE))
    return path.with_name(FILE)


def winograd_graph(
    model: ModelProto,
    sizes: Mapping[str, int],
    choose: Callable[[Convolution], int | None] = best_tile,
) -> ModelProto | None:
    """A copy of a graph with functions in place of the 3x3 convolutions that gain by it; `None` if none does.

    Args:
        model: a graph; its weights may lie outside and are not read.
        sizes: the free axes' usual sizes, which the choice is made for. The graph is right at every size.
        choose: the tile of a convolution, 2 or 4, or `None`.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    convolutions = _convolutions(model, sizes)
    tiles = set()
    for node in copy.graph.node:
        tile = choose(convolutions[node.output[0]]) if node.output[0] in convolutions else None
        if tile is not None:
            node.op_type, node.domain = _function_name(tile), DOMAIN
            del node.attribute[:]
            tiles.add(tile)
    if not tiles:
        return None
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    copy.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    copy.functions.extend(_function(tile, opset) for tile in sorted(tiles))
    return copy


def _convolutions(model: ModelProto, sizes: Mapping[str, int]) -> dict[str, Convolution]:
    """The convolutions that a function can stand for, by the name of their output."""
    nominal = ModelProto()
    nominal.CopyFrom(model)
    for value in (*nominal.graph.input, *nominal.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            with suppress(KeyError):  # an axis of another kind stays free
                dimension.dim_value = axis_size(dimension.dim_param, sizes)
    inferred = shape_inference.infer_shapes(nominal, data_prop=True).graph
    shapes = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input)
    }
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if _is_plain_3x3(node, weights):
            channels_out, channels_in, _, _ = weights[node.input[1]]
            _, _, height, width = shapes.get(node.input[0]) or (0, 0, 0, 0)  # 0: inference did not get that far
            found[node.output[0]] = Convolution(channels_in, channels_out, height * width)
    return found


def _is_plain_3x3(node: NodeProto, weights: Mapping[str, tuple[int, ...]]) -> bool:
    """3x3, stride 1, a border of 1, one group, with a bias, weights known."""
    if node.op_type != "Conv" or len(node.input) != 3 or weights.get(node.input[1], ())[2:] != (3, 3):
        return False
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    expected = {"strides": [1, 1], "dilations": [1, 1], "group": 1, "pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    auto_pad = attributes.pop("auto_pad", b"NOTSET")
    return auto_pad == b"NOTSET" and "pads" in attributes and {**expected, **attributes} == expected


@cache
def transforms(tile: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The matrices A, G and B^T of one dimension: outputs are A^T [(G weights) * (B^T inputs)].

    Multiplying polynomials by their values at some points and infinity, transposed (Toom and Cook).

    Returns:
        (tile + 2, tile), (tile + 2, 3) and (tile + 2, tile + 2).
    """
    values = {degree: _values(_POINTS[tile], degree) for degree in (tile, 3, tile + 2)}
    return values[tile], values[3], np.asarray(np.linalg.inv(values[tile + 2]).T, np.float64)


def _values(points: tuple[float, ...], coefficients: int) -> NDArray[np.float64]:
    """The matrix from a polynomial's coefficients to its values at the points and at infinity."""
    finite = np.vander(points, coefficients, increasing=True)
    return np.vstack([finite, np.eye(coefficients)[-1:]])


def _function_name(tile: int) -> str:
    return f"Conv3x3Tile{tile}"


# Axes: n = (tile + 2)^2 places in a tile, t tiles in all pictures of the batch, c channels in, o channels out.
# Channels go last, so that a tile's place is a row that can be copied whole. The weights are on the left of the
# product: onnxruntime packs what is on the right, and the tiles are smaller.
_BODY = """
<opset_import: ["" : {opset}], domain: "{domain}">
{name} (x, w, b) => (y)
{{
    shape = Shape(x)
    batch, channels, height, width = Split<num_outputs = 4>(shape)
    w_shape = Shape(w)
    out_channels = Slice(w_shape, zero, one)

    rows_up = Add(height, tile_less_one)
    tile_rows = Div(rows_up, tile)
    columns_up = Add(width, tile_less_one)
    tile_columns = Div(columns_up, tile)
    full_height = Mul(tile_rows, tile)
    full_width = Mul(tile_columns, tile)
    padded_height = Add(full_height, two)
    padded_width = Add(full_width, two)

    below = Sub(full_height, height)
    below_all = Add(below, one)
    right = Sub(full_width, width)
    right_all = Add(right, one)
    pads = Concat<axis = 0>(zero, one, one, zero, zero, below_all, right_all, zero)
    x32 = Cast<to = 1>(x)
    channels_last = Transpose<perm = [0, 2, 3, 1]>(x32)
    padded = Pad(channels_last, pads)
    by_place = Concat<axis = 0>(minus_one, channels)
    places = Reshape(padded, by_place)

    batch_scalar = Squeeze(batch)
    tile_rows_scalar = Squeeze(tile_rows)
    tile_columns_scalar = Squeeze(tile_columns)
    picture_numbers = Range(zero_scalar, batch_scalar, one_scalar)
    row_numbers = Range(zero_scalar, tile_rows_scalar, one_scalar)
    column_numbers = Range(zero_scalar, tile_columns_scalar, one_scalar)
    picture_size = Mul(padded_height, padded_width)
    picture_starts = Mul(picture_numbers, picture_size)
    row_step = Mul(padded_width, tile)
    row_starts = Mul(row_numbers, row_step)
    column_starts = Mul(column_numbers, tile)
    pictures = Unsqueeze(picture_starts, last_two)
    rows = Unsqueeze(row_starts, one)
    tiles_of_picture = Add(rows, column_starts)
    tile_starts = Add(pictures, tiles_of_picture)
    tile_line = Reshape(tile_starts, as_row)
    offset_rows = Mul(place_rows, padded_width)
    offsets = Add(offset_rows, place_columns)
    index = Add(offsets, tile_line)

    tiles = Gather<axis = 0>(places, index)
    tiles_shape = Shape(tiles)
    tiles_flat = Reshape(tiles, as_places)
    values_flat = MatMul(input_transform, tiles_flat)
    values = Reshape(values_flat, tiles_shape)

    w32 = Cast<to = 1>(w)
    w_flat = Reshape(w32, as_weights)
    u_flat = Gemm<transB = 1>(weight_transform, w_flat)
    u_shape = Concat<axis = 0>(place_count, out_channels, channels)
    u = Reshape(u_flat, u_shape)
    values_right = Transpose<perm = [0, 2, 1]>(values)
    products_left = MatMul(u, values_right)
    products = Transpose<perm = [0, 2, 1]>(products_left)

    products_flat = Reshape(products, as_places)
    outputs = MatMul(output_transform, products_flat)
    split = Concat<axis = 0>(tile, tile, batch, tile_rows, tile_columns, out_channels)
    outputs_split = Reshape(outputs, split)
    joined = Transpose<perm = [2, 3, 0, 4, 1, 5]>(outputs_split)
    picture = Concat<axis = 0>(batch, full_height, full_width, out_channels)
    full = Reshape(joined, picture)
    b32 = Cast<to = 1>(b)
    biased = Add(full, b32)
    ends = Concat<axis = 0>(height, width)
    cropped = Slice(biased, zeros, ends, one_two)
    channels_first = Transpose<perm = [0, 3, 1, 2]>(cropped)
    y = CastLike(channels_first, x)
}}
"""


def _function(tile: int, opset: int) -> FunctionProto:
    """A 3x3 convolution with a border of 1, `Conv3x3TileN(x, w, b)`, computed in float32 whatever the types are."""
    name = _function_name(tile)
    function = parser.parse_function(_BODY.format(opset=opset, domain=DOMAIN, name=name))
    side = tile + 2
    output, weight, inputs = transforms(tile)
    place_rows, place_columns = np.divmod(np.arange(side * side), side)
    constants: dict[str, Any] = {
        "zero": [0], "one": [1], "two": [2], "minus_one": [-1], "zeros": [0, 0], "one_two": [1, 2], "last_two": [1, 2],
        "zero_scalar": 0, "one_scalar": 1, "tile": [tile], "tile_less_one": [tile - 1], "place_count": [side * side],
        "as_row": [1, -1], "as_weights": [-1, 9], "as_places": [side * side, -1],
        "place_rows": place_rows[:, None], "place_columns": place_columns[:, None],
    }  # fmt: skip
    arrays = {name: np.array(value, np.int64) for name, value in constants.items()}
    arrays["output_transform"] = np.kron(output.T, output.T).astype(np.float32)
    arrays["weight_transform"] = np.kron(weight, weight).astype(np.float32)
    arrays["input_transform"] = np.kron(inputs, inputs).astype(np.float32)
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name))
        for name, array in arrays.items()
        if any(name in node.input for node in function.node)
    ]
    nodes += function.node
    del function.node[:]
    function.node.extend(nodes)
    return function
