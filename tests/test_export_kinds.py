"""Adapter files of every kind: read by names and shapes, exported, validated, merged; what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from adapter_files import (
    read,
)
from click.testing import CliRunner
from oracle import diffusers_noise, diffusers_unet
from safetensors.torch import save_file
from tiny import HIDDEN_WIDTH, TEXT_WIDTH, tiny_adapter

from ipa.engines.bundle import Bundle, hash_file
from ipa.export.adapters import AdapterFile
from ipa.export.bundle_adapters import add_adapter
from ipa.export.checks import TOLERANCES, agreement, change
from ipa.export.cli import main
from ipa.export.oracle_projections import diffusers_projection
from ipa.trainer.weights import load_adapter

NAMES = {"base": "tiny", "plus": "plus", "full-face": "full-face"}


def unet_config(base: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((base / "unet" / "config.json").read_text())
    return config


def test_adding_every_kind_leaves_the_rest(tiny_bundle: Path, tiny_kind_files: dict[str, Path], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    before = {path: hash_file(path) for path in bundle.rglob("*.onnx*")}
    for kind in ("plus", "full-face"):
        arguments = ["adapter", "--bundle", str(bundle), "--adapter", f"{kind}={tiny_kind_files[kind]}"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
    assert {path: hash_file(path) for path in before} == before
    text = CliRunner().invoke(main, ["inspect", str(bundle)]).stdout
    assert "full-face, 37 tokens per image, reads hidden_states (negative half: zero-pixels)" in text
    assert "plus, 16 tokens per image, reads hidden_states (negative half: zero-pixels)" in text
    assert "base, 4 tokens per image, reads image_embeds (negative half: zeros)" in text


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        (16, {}),
        (1, {"depth": 1, "attention_width": 64}),
        (7, {"depth": 6, "latent_width": 24, "attention_width": 192, "ratio": 3}),
    ],
)
def test_a_resampler_of_any_size(
    tiny_bundle: Path, tiny_base: Path, tmp_path: Path, tokens: int, sizes: dict[str, int]
) -> None:
    file = tiny_adapter(
        unet_config(tiny_base), tmp_path / "x.bin", tokens=tokens, kind="plus", dtype=torch.float16, **sizes
    )
    weights = read(tiny_bundle, file)
    assert weights.tokens == tokens
    hidden_states = torch.randn(3, 37, HIDDEN_WIDTH)
    with torch.no_grad():
        projection = weights.module().projection
        found, expected = projection(hidden_states), diffusers_projection(weights)(hidden_states)
    # float32 sums in another order; the norm at the end makes numbers of about 1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_containers_and_dtypes_do_not_matter(
    tiny_bundle: Path, tiny_kind_files: dict[str, Path], tmp_path: Path
) -> None:
    """As published: projection in float32, keys and values in float16, nested or flat."""
    state = load_adapter(tiny_kind_files["plus"])
    mixed = {name: tensor.half() if name.startswith("ip_adapter") else tensor for name, tensor in state.items()}
    save_file(mixed, tmp_path / "mixed.safetensors")
    nested: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in mixed.items():
        group, rest = name.split(".", 1)
        nested[group][rest] = tensor
    torch.save(nested, tmp_path / "mixed.bin")
    one, other = read(tiny_bundle, tmp_path / "mixed.safetensors"), read(tiny_bundle, tmp_path / "mixed.bin")
    assert one.kind.name == other.kind.name == "plus"
    pairs = [*zip(one.keys_values, other.keys_values, strict=True)]
    pairs += [(tensor, other.projection[name]) for name, tensor in one.projection.items()]
    assert {tensor.dtype for pair in pairs for tensor in pair} == {torch.float32}
    assert all(torch.equal(*pair) for pair in pairs)


def test_a_module_leaves_the_weights_as_they_are(tiny_bundle: Path, tiny_kind_files: dict[str, Path]) -> None:
    """Half precision converts a module in place; the same weights are exported twice with --merged."""
    weights = read(tiny_bundle, tiny_kind_files["plus"])
    before = {name: tensor.clone() for name, tensor in weights.projection.items()}
    weights.module().half()
    assert all(torch.equal(tensor, weights.projection[name]) for name, tensor in before.items())


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_validate_passes_every_kind(
    tiny_kinds_bundle: Path,
    tiny_kinds_half_bundle: Path,
    tiny_base: Path,
    tiny_kind_files: dict[str, Path],
    tmp_path: Path,
    dtype: str,
) -> None:
    source = tiny_kinds_bundle if dtype == "fp32" else tiny_kinds_half_bundle
    bundle = Path(shutil.copytree(source, tmp_path / "bundle"))
    arguments = ["--bundle", str(bundle), "--base", str(tiny_base)]
    for kind in ("plus", "full-face"):
        arguments += ["--adapter", f"{kind}={tiny_kind_files[kind]}"]
    result = CliRunner().invoke(main, ["validate", *arguments])
    assert result.exit_code == 0, result.output
    figures = Bundle.open(bundle).manifest.validation
    checks = {check["name"]: check for check in figures["checks"]}
    for kind in ("plus", "full-face"):
        names = {f"ip_adapter/{kind}", f"step, {kind}", f"step, {kind}, moves with image", f"run, {kind}"}
        assert names <= set(checks)
        assert checks[f"ip_adapter/{kind}"]["tolerance"] == TOLERANCES[{"fp32": "float32", "fp16": "float16"}[dtype]]


def test_validate_tells_other_weights(tiny_kinds_bundle: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Not the adapters' own files, but such of the same kind and size."""
    bundle = Path(shutil.copytree(tiny_kinds_bundle, tmp_path / "bundle"))
    arguments = ["validate", "--bundle", str(bundle), "--base", str(tiny_base)]
    for kind in ("plus", "full-face"):
        other = tiny_adapter(unet_config(tiny_base), tmp_path / f"{kind}.bin", tokens=16, seed=9, kind=kind)
        arguments += ["--adapter", f"{kind}={other}"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    failed = result.stderr.rpartition("differs from its models in: ")[2].strip().split("; ")
    assert {"ip_adapter/plus", "ip_adapter/full-face", "step, plus", "step, full-face"} <= set(failed)


@pytest.mark.parametrize(("kind", "dtype"), [("plus", "fp16"), ("full-face", "fp32")])
def test_merged_graph_takes_hidden_states(
    tiny_base: Path, tiny_kind_files: dict[str, Path], tmp_path: Path, kind: str, dtype: str
) -> None:
    file = tmp_path / "merged" / "step.onnx"
    arguments = ["--base", str(tiny_base), "--adapter", f"{kind}={tiny_kind_files[kind]}", "--dtype", dtype]
    arguments += ["--output", str(tmp_path / "bundle"), "--merged", str(file), "--merged-scale", "0.6"]
    result = CliRunner().invoke(main, ["onnx", *arguments])
    assert result.exit_code == 0, result.output
    meta = json.loads(file.with_name("step.onnx.meta.json").read_text())
    names = ["sample", "timestep", "encoder_hidden_states", "hidden_states"]
    assert [tensor["name"] for tensor in meta["inputs"]] == names
    assert (meta["adapter"]["kind"], meta["adapter"]["negative"]) == (kind, "zero-pixels")

    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4, 9, 16), (3, 77, TEXT_WIDTH), (3, 37, HIDDEN_WIDTH))
    stored = torch.float16 if dtype == "fp16" else torch.float32
    sample, text, hidden = (torch.randn(shape, generator=generator).to(stored) for shape in shapes)
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    inputs = dict(zip(names, (sample.numpy(), np.float32(981), text.numpy(), hidden.numpy()), strict=True))
    (found,) = session.run(["noise_pred"], {name: np.asarray(value) for name, value in inputs.items()})
    unet = diffusers_unet(tiny_base, tiny_kind_files[kind])
    expected = diffusers_noise(unet, sample.float(), 981, text.float(), hidden.float(), 0.6).numpy()
    tolerance = TOLERANCES["float16" if dtype == "fp16" else "float32"]
    assert agreement("merged", "", {"": found}, {"": expected}, tolerance).passed
    without = diffusers_noise(unet, sample.float(), 981, text.float(), hidden.float(), 0.0).numpy()
    assert change("merged", found, without, 0.025).passed, "the adapter is inside"


def test_an_adapter_of_the_kind_base_beside_the_others_is_the_same_file(
    tiny_bundle: Path, tiny_kinds_bundle: Path
) -> None:
    before, after = (Bundle.open(bundle, verify=False).manifest for bundle in (tiny_bundle, tiny_kinds_bundle))
    assert after.adapters["tiny"] == before.adapters["tiny"]
    assert after.defaults == before.defaults
    assert replace(after, adapters=before.adapters) == before


@pytest.mark.parametrize("engine_name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["plus", "full-face"])
def test_engines_of_the_cpu_at_any_batch(
    kind: str,
    dtype: str,
    engine_name: str,
    tiny_kind_files: dict[str, Path],
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue({"float32": "tiny_kinds_bundle", "float16": "tiny_kinds_half_bundle"}[dtype])
    reference = read(folder, tiny_kind_files[kind]).module()
    with Bundle.open(folder, verify=False).open_component(f"ip_adapter/{kind}", engine_name) as engine:
        tolerance = max(TOLERANCES[dtype], TOLERANCES[engine.precision])
        for batch in (1, 2, 5):
            hidden_states = torch.randn(batch, 37, HIDDEN_WIDTH).to(getattr(torch, dtype))
            found = engine(hidden_states=hidden_states.numpy())
            with torch.no_grad():
                expected = {"image_kv": reference(hidden_states.float()).numpy()}
            check = agreement(kind, "", found, expected, tolerance)
            assert check.passed, str(check)


def test_opset_20(tiny_bundle: Path, tiny_kind_files: dict[str, Path], tmp_path: Path) -> None:
    """Gelu is an operator of its own there."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    for kind in ("plus", "full-face"):
        add_adapter(bundle, AdapterFile(kind, tiny_kind_files[kind]), force=False, is_default=False, opset=20)
        hidden_states = torch.randn(2, 37, HIDDEN_WIDTH)
        with Bundle.open(bundle).open_component(f"ip_adapter/{kind}", "onnxruntime") as engine, torch.no_grad():
            found = engine(hidden_states=hidden_states.numpy())["image_kv"]
            expected = read(bundle, tiny_kind_files[kind]).module()(hidden_states).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
