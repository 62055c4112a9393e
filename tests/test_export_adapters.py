"""Adapter files: what fits goes in without touching the UNet, what does not is refused with a reason."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from tiny import tiny_adapter

from ipa.engines.bundle import Bundle
from ipa.engines.errors import IpaError
from ipa.engines.manifest import FILE_NAME, Manifest
from ipa.export.adapters import AdapterFile
from ipa.export.cli import main
from ipa.export.controlnets import ControlNetSource


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that the test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def add(bundle: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["adapter", "--bundle", str(bundle), *arguments])


def edit(bundle: Path, change: Callable[[Manifest], Manifest]) -> None:
    file = bundle / FILE_NAME
    file.write_text(change(Manifest.from_json(file.read_text())).to_json())


def unet_config(base: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((base / "unet" / "config.json").read_text())
    return config


def test_adds_an_adapter_and_leaves_the_rest(bundle: Path, tiny_base: Path, tmp_path: Path) -> None:
    before = Bundle.open(bundle).manifest
    stamp = (bundle / "unet" / "model.onnx").stat().st_mtime_ns
    file = tiny_adapter(unet_config(tiny_base), tmp_path / "x.bin", seed=3, tokens=16)
    result = add(bundle, "--adapter", f"second={file}")
    assert result.exit_code == 0, result.output
    after = Bundle.open(bundle).manifest
    assert after.components == before.components
    assert (bundle / "unet" / "model.onnx").stat().st_mtime_ns == stamp
    assert list(after.adapters) == ["tiny", "second"]
    assert after.adapters["second"].tokens == 16
    assert after.defaults.adapter == "tiny"


def test_replaces_an_adapter_only_with_force(bundle: Path, tiny_base: Path, tmp_path: Path) -> None:
    file = tiny_adapter(unet_config(tiny_base), tmp_path / "x.safetensors", seed=3)
    edit(bundle, lambda manifest: replace(manifest, validation={"passed": True, "checks": []}))
    before = Bundle.open(bundle).manifest
    old = before.adapters["tiny"]
    result = add(bundle, "--adapter", f"tiny={file}")
    assert (result.exit_code, "--force" in result.output) == (2, True)
    assert Bundle.open(bundle).manifest == before
    for _ in range(2):
        assert add(bundle, "--adapter", f"tiny={file}", "--force", "--default").exit_code == 0
        manifest = Bundle.open(bundle).manifest
        assert manifest.adapters["tiny"].component.files[0].sha256 != old.component.files[0].sha256
        assert len(list((bundle / "ip_adapter").iterdir())) == 1, "the replaced graph is removed"
        assert manifest.validation == {}, "the figures were another adapter's"


def test_removes_only_what_commands_left_behind(bundle: Path, tiny_adapter_file: Path) -> None:
    adapters = bundle / "ip_adapter"
    for path in ("killed/model.onnx", ".partial-x/killed/model.onnx", "notes/thesis.tex", "second/read.me"):
        (adapters / path).parent.mkdir(parents=True)
        (adapters / path).write_text("x")
    (adapters / "deep").mkdir()
    (adapters / "tiny").rename(adapters / "deep" / "x")
    text = (bundle / FILE_NAME).read_text().replace("ip_adapter/tiny/", "ip_adapter/deep/x/")
    (bundle / FILE_NAME).write_text(text)
    assert add(bundle, "--adapter", f"second={tiny_adapter_file}").exit_code == 0
    held = {path.relative_to(adapters).as_posix() for path in adapters.rglob("*") if path.is_file()}
    assert held == {"notes/thesis.tex", "second/read.me", "deep/x/model.onnx", "second.2/model.onnx"}
    assert list(Bundle.open(bundle).manifest.adapters) == ["tiny", "second"]


def test_never_writes_behind_a_link(bundle: Path, tiny_adapter_file: Path, tmp_path: Path) -> None:
    edit(bundle, lambda manifest: replace(manifest, adapters={}, defaults=replace(manifest.defaults, adapter="")))
    elsewhere = (bundle / "ip_adapter").rename(tmp_path / "elsewhere")
    (elsewhere / "thesis").mkdir()
    (bundle / "ip_adapter").symlink_to(elsewhere)
    result = add(bundle, "--adapter", f"x={tiny_adapter_file}")
    assert (result.exit_code, "is a link to" in result.stderr) == (2, True), result.output
    assert sorted(path.name for path in elsewhere.iterdir()) == ["thesis", "tiny"]
    assert Bundle.open(bundle).manifest.adapters == {}


def test_failed_replacement_leaves_the_old_adapter(
    bundle: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tiny_adapter(unet_config(tiny_base), tmp_path / "x.safetensors", seed=3)
    old = Bundle.open(bundle).manifest

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ipa.export.bundle_adapters.update_manifest", fail)
    assert add(bundle, "--adapter", f"tiny={file}", "--force").exit_code == 1
    assert Bundle.open(bundle).manifest == old
    monkeypatch.undo()
    assert add(bundle, "--adapter", f"tiny={file}", "--force").exit_code == 0
    assert Bundle.open(bundle).manifest.adapters["tiny"] != old.adapters["tiny"]


class Payload:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch pwned",)


def edited(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path, Path], Path]:
    def make(good: Path, folder: Path) -> Path:
        state = load_file(good)
        change(state)
        save_file(state, folder / "edited.safetensors")
        return folder / "edited.safetensors"

    return make


def renamed(**names: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        for old, new in names.items():
            state[f"image_proj.{new}"] = state.pop(f"image_proj.{old.replace('__', '.')}")

    return change


def drop(key: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda state: state.__delitem__(key)


def wide(state: dict[str, torch.Tensor]) -> None:
    for key in list(state):
        if key.startswith("ip_adapter"):
            state[key] = torch.zeros(len(state[key]), 2048)


def other_encoder(state: dict[str, torch.Tensor]) -> None:
    state["image_proj.proj.weight"] = torch.zeros(len(state["image_proj.proj.weight"]), 1280)


def fewer_layers(state: dict[str, torch.Tensor]) -> None:
    for which in "kv":
        del state[f"ip_adapter.31.to_{which}_ip.weight"]


def ragged(state: dict[str, torch.Tensor]) -> None:
    state["image_proj.proj.bias"] = torch.zeros(7)


def flat_projection(state: dict[str, torch.Tensor]) -> None:
    state["image_proj.proj.weight"] = torch.zeros(1920)


def written(name: str, content: bytes) -> Callable[[Path, Path], Path]:
    def make(good: Path, folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def pickled(good: Path, folder: Path) -> Path:
    torch.save({"image_proj": {"proj.weight": Payload()}, "ip_adapter": {}}, folder / "evil.bin")
    return folder / "evil.bin"


BAD_FILES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "missing": (lambda good, folder: folder / "none.bin", "none.bin"),
    "empty": (written("empty.safetensors", b""), "not a readable"),
    "empty bin": (written("empty.bin", b""), "empty.bin"),
    "random": (written("random.bin", bytes(range(256)) * 40), "random.bin"),
    "random safetensors": (written("random.safetensors", bytes(range(256)) * 40), "not a readable"),
    "another suffix": (written("adapter.ckpt", b"x"), ".safetensors or .bin"),
    "malicious pickle": (pickled, "refused"),
    "full-face, incomplete": (edited(renamed(proj__weight="proj.3.weight")), "misses image_proj.proj.0.weight"),
    "unknown kind": (edited(renamed(proj__weight="x", norm__weight="y")), "unknown kind: its image_proj starts with"),
    "sdxl": (edited(wide), "text width 2048, this one has 48"),
    "image encoder": (edited(other_encoder), "embedding width 1280, this one has 40"),
    "layers": (edited(fewer_layers), "15 cross-attention layers, this base model has 16"),
    "rank": (edited(flat_projection), "image_proj.proj.weight is (1920,), expected 2 axes"),
    "missing key": (edited(drop("image_proj.norm.bias")), "misses image_proj.norm.bias"),
    "shape": (edited(ragged), "proj.bias is (7,)"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses(
    case: str, bundle: Path, tiny_adapter_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, message = BAD_FILES[case]
    monkeypatch.chdir(tmp_path)
    before = Bundle.open(bundle).manifest
    result = add(bundle, "--adapter", f"bad={make(tiny_adapter_file, tmp_path)}")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "pwned").exists()
    assert Bundle.open(bundle).manifest == before
    assert [path.name for path in (bundle / "ip_adapter").iterdir()] == ["tiny"]


def test_accepts_mixed_dtypes(bundle: Path, tiny_adapter_file: Path, tmp_path: Path) -> None:
    state = load_file(tiny_adapter_file)
    mixed = {key: value.half() if key.startswith("ip_adapter") else value for key, value in state.items()}
    save_file(mixed, tmp_path / "mixed.safetensors")
    result = add(bundle, "--adapter", f"mixed={tmp_path / 'mixed.safetensors'}", "--opset", "20")
    assert result.exit_code == 0, result.output
    model = onnx.load(bundle / "ip_adapter" / "mixed" / "model.onnx")
    assert model.opset_import[0].version == 20


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert AdapterFile.parse("cat=a/b=c.bin") == AdapterFile("cat", Path("a/b=c.bin"))
    assert AdapterFile.parse("a/ip-adapter_sd15.v2.bin") == AdapterFile(
        "ip-adapter_sd15-v2", Path("a/ip-adapter_sd15.v2.bin")
    )
    monkeypatch.chdir(tmp_path)
    Path("w=1.safetensors").touch()
    assert AdapterFile.parse("w=1.safetensors") == AdapterFile("w-1", Path("w=1.safetensors"))
    assert ControlNetSource.parse("x=w=1.safetensors") == ControlNetSource("x", "w=1.safetensors")
    assert ControlNetSource.parse("w=1.safetensors") == ControlNetSource("w-1-safetensors", "w=1.safetensors")
    for bad in ("=x.bin", "a b=x.bin", "..=x.bin"):
        with pytest.raises(IpaError, match="adapter name"):
            AdapterFile.parse(bad)
