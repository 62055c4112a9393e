"""What an ONNX file says of data outside itself, read without the `onnx` package.

Walks the protobuf wire format only as deep as needed: model -> graph -> tensors, nodes, sub-graphs.
Source: onnx/onnx.proto (field numbers below), protobuf's encoding guide.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ipa.engines.errors import BundleError

_MODEL_GRAPH, _MODEL_FUNCTIONS = 7, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE_INITIALIZER = 1, 5, 15
_FUNCTION_NODE = 7
_NODE_ATTRIBUTE = 5
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES = 22, 23
_TENSOR_EXTERNAL_DATA = 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_DEPTH = 32


@dataclass(frozen=True)
class ExternalData:
    """Where one tensor's bytes lie: file beside the graph, byte offset, byte length (`None`: to the end)."""

    location: str
    offset: int
    length: int | None


def external_data(path: Path) -> list[ExternalData]:
    """Every external-data entry of the graph's initialisers.

    Raises:
        BundleError: the file is not protobuf, or holds what we never write and never read:
            sparse tensors, or external data outside an initialiser.
    """
    if not path.stat().st_size:
        raise BundleError(f"{path} is empty; export the bundle again")
    with path.open("rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))  # unmapped when the last view goes
    try:
        return list(_model(view))
    except (IndexError, UnicodeDecodeError, _WireError) as error:
        raise BundleError(f"{path} is not a valid ONNX file ({error}); export the bundle again") from error


class _WireError(ValueError):
    pass


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise _WireError("a varint is too long")


def _fields(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Length-delimited fields (number, content) of one message; the others are skipped."""
    at, end = 0, len(view)
    while at < end:
        tag, at = _varint(view, at)
        kind = tag & 7
        if kind == _BYTES:
            length, at = _varint(view, at)
            if at + length > end:
                raise _WireError("a field ends beyond its message")
            yield tag >> 3, view[at : at + length]
            at += length
        elif kind == _VARINT:
            _, at = _varint(view, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise _WireError(f"wire type {kind}")


def _model(view: memoryview) -> Iterator[ExternalData]:
    for number, content in _fields(view):
        if number == _MODEL_GRAPH:
            yield from _graph(content, 0)
        elif number == _MODEL_FUNCTIONS:
            for inner, node in _fields(content):
                if inner == _FUNCTION_NODE:
                    yield from _node(node, 0)


def _graph(view: memoryview, depth: int) -> Iterator[ExternalData]:
    if depth > _MAX_DEPTH:
        raise _WireError("sub-graphs are nested too deeply")
    for number, content in _fields(view):
        if number == _GRAPH_INITIALIZER:
            yield from _tensor(content)
        elif number == _GRAPH_NODE:
            yield from _node(content, depth)
        elif number == _GRAPH_SPARSE_INITIALIZER:
            raise _WireError("it has sparse initialisers")


def _node(view: memoryview, depth: int) -> Iterator[ExternalData]:
    for number, attribute in _fields(view):
        if number != _NODE_ATTRIBUTE:
            continue
        for inner, content in _fields(attribute):
            if inner in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS) and list(_tensor(content)):
                raise _WireError("a node's attribute has external data")
            if inner in (_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES):
                raise _WireError("a node's attribute is a sparse tensor")
            if inner in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                yield from _graph(content, depth + 1)


def _tensor(view: memoryview) -> Iterator[ExternalData]:
    entries: dict[str, str] = {}
    for number, content in _fields(view):
        if number == _TENSOR_EXTERNAL_DATA:
            pair = {inner: bytes(text).decode() for inner, text in _fields(content)}
            entries[pair.get(_ENTRY_KEY, "")] = pair.get(_ENTRY_VALUE, "")
    if entries:
        try:
            length = int(entries["length"]) if "length" in entries else None
            yield ExternalData(entries["location"], int(entries.get("offset", "0")), length)
        except (KeyError, ValueError) as error:
            raise _WireError(f"bad external data entry {entries}") from error
