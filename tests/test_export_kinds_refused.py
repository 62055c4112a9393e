"""Adapter files that are refused: of a kind that is not supported, damaged, or for another base model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_files import (
    Shapes,
    face_id_shapes,
    flat,
    full_face_shapes,
    layer_shapes,
    lora_shapes,
    read,
    resampler_shapes,
)
from click.testing import CliRunner
from safetensors.torch import save_file
from tiny import HIDDEN_WIDTH, TEXT_WIDTH

from ipa.engines.bundle import Bundle
from ipa.engines.errors import IpaError
from ipa.export.adapters import fitted
from ipa.export.cli import main
from ipa.export.dimensions import manifest_dimensions
from ipa.trainer.weights import load_adapter

LAYERS = [8, 8]
FACE_IDS: dict[str, tuple[Shapes, bool]] = {
    "FaceID": (face_id_shapes(TEXT_WIDTH), True),
    "FaceID-Plus": (face_id_shapes(TEXT_WIDTH, hidden_width=HIDDEN_WIDTH), True),
    "FaceID-portrait": (face_id_shapes(TEXT_WIDTH, tokens=16), False),
}


@pytest.mark.parametrize("kind", FACE_IDS)
def test_face_id_is_refused_by_name(kind: str, tiny_bundle: Path, tmp_path: Path) -> None:
    shapes, has_lora = FACE_IDS[kind]
    layers = layer_shapes(LAYERS, TEXT_WIDTH) | (lora_shapes(len(LAYERS)) if has_lora else {})
    nested = {
        "image_proj": {name: torch.zeros(shape) for name, shape in shapes.items()},
        "ip_adapter": {name: torch.zeros(shape) for name, shape in layers.items()},
    }
    torch.save(nested, tmp_path / "face.bin")
    result = CliRunner().invoke(
        main, ["adapter", "--bundle", str(tiny_bundle), "--adapter", str(tmp_path / "face.bin")]
    )
    assert result.exit_code == 2
    assert f"of the kind {kind}, which is not supported: it reads face embeddings of InsightFace" in result.stderr
    assert ("its LoRA changes the UNet" in result.stderr) == has_lora
    assert len(result.stderr.splitlines()) == 1


def changed(**shapes: tuple[int, ...] | None) -> Callable[[dict[str, torch.Tensor]], None]:
    """Other shapes for some tensors of `image_proj`; `None`: the tensors whose names start so go away."""

    def change(state: dict[str, torch.Tensor]) -> None:
        for name, shape in shapes.items():
            key = f"image_proj.{name.replace('__', '.')}"
            if shape is None:
                for found in [found for found in state if found.startswith(key)]:
                    del state[found]
            else:
                state[key] = torch.zeros(shape)

    return change


BAD_PLUS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "a layer in the middle": (changed(layers__1__=None), "misses image_proj.layers."),
    "the first layer": (changed(layers__0__=None), "misses image_proj.layers.0.0.to_q.weight"),
    "all layers": (changed(layers=None), "misses image_proj.layers.0.0.to_q.weight"),
    "half a layer": (changed(layers__3__1__=None), "misses image_proj.layers.3.1.0.bias"),
    "a tensor": (changed(norm_out__bias=None), "misses image_proj.norm_out.bias"),
    "one tensor more": (changed(pos_emb__weight=(257, 32)), "has the unknown image_proj.pos_emb.weight"),
    "a layer of far away": (changed(layers__999999999__0__norm1__weight=(40,)), "misses image_proj.layers.4.0"),
    "layer of another width": (changed(layers__2__0__to_q__weight=(64, 40)), "layers.2.0.to_q.weight is (64, 40)"),
    "heads": (changed(layers__0__0__to_q__weight=(100, 40)), "100 wide, expected a multiple of 64"),
    "rank": (changed(latents=(16, 40)), "image_proj.latents is (16, 40), expected 3 axes"),
    "no tokens": (changed(latents=(1, 0, 40)), "image_proj.latents is (1, 0, 40)"),
    "encoder": (changed(proj_in__weight=(40, 1280)), "hidden width 1280, this one has 32 (1280: ViT-H/14, 1664"),
    "output": (changed(proj_out__weight=(2048, 40)), "proj_out.weight is (2048, 40), this base model wants (48, 40)"),
}


BAD_FULL_FACE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "a tensor": (changed(proj__2__bias=None), "misses image_proj.proj.2.bias"),
    "encoder": (changed(proj__0__weight=(1664, 1664)), "hidden width 1664, this one has 32"),
    "output": (changed(proj__3__weight=(768,)), "proj.3.weight is (768,), this base model wants (48,)"),
    "not square": (changed(proj__0__weight=(64, 32)), "proj.0.weight is (64, 32), this base model wants (32, 32)"),
}


BAD_FILES = [
    *(("plus", name, *case) for name, case in BAD_PLUS.items()),
    *(("full-face", name, *case) for name, case in BAD_FULL_FACE.items()),
]


@pytest.mark.parametrize(("kind", "change", "message"), [(case[0], *case[2:]) for case in BAD_FILES])
def test_refuses(
    kind: str,
    change: Callable[[dict[str, torch.Tensor]], None],
    message: str,
    tiny_bundle: Path,
    tiny_kind_files: dict[str, Path],
    tmp_path: Path,
) -> None:
    state = load_adapter(tiny_kind_files[kind])
    change(state)
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(IpaError) as refusal:
        read(tiny_bundle, tmp_path / "bad.safetensors")
    assert message in str(refusal.value)
    assert str(tmp_path / "bad.safetensors") in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["plus", "full-face"])
def test_another_family_is_refused_with_both_sides(tiny_bundle: Path, kind: str) -> None:
    manifest = Bundle.open(tiny_bundle, verify=False).manifest
    dimensions = manifest_dimensions(manifest)
    shapes = {
        "plus": resampler_shapes(HIDDEN_WIDTH, 16, 2048, latent_width=40, attention_width=64),
        "full-face": full_face_shapes(HIDDEN_WIDTH, 2048),
    }[kind]
    widths = list(manifest.kv_layout.widths)

    def check(layers: Shapes) -> None:
        state = {name: torch.empty(shape, device="meta") for name, shape in flat(shapes, layers).items()}
        fitted(Path("xl.safetensors"), state, "", manifest.kv_layout, dimensions)

    with pytest.raises(IpaError, match="text width 2048, this one has 48"):
        check(layer_shapes(widths, 2048))
    with pytest.raises(IpaError, match="70 cross-attention layers, this base model has 16"):
        check(layer_shapes([24] * 70, 48))
