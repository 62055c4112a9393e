"""What every back-end that runs here refuses, in the same words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_kv_bundle import WIDTH, write_bundle

from ipa.engines.bundle import Bundle
from ipa.engines.errors import EngineError
from ipa.engines.spec import ComponentSpec, TensorSpec


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


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


def test_a_broken_back_end_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libx.so: cannot open shared object file\nTraceback")

    monkeypatch.setattr("ipa.engines.registry.import_module", broken)
    with pytest.raises(EngineError) as caught:
        Bundle.open(root).open_component("text_kv", "onnxruntime")
    message = str(caught.value)
    assert "the engine 'onnxruntime' cannot be loaded: libx.so: cannot open shared object file; run `pip" in message
    assert "\n" not in message
