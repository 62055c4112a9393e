"""`--lora`: weights with LoRAs added, against diffusers' `load_lora_weights` and `fuse_lora` (which need peft)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lora_files import (
    ALPHA,
    RANK,
    as_diffusers,
    as_kohya,
    as_old_diffusers,
    as_pickle,
    pipeline,
    saved,
    text_encoders,
    weights,
    write_lora,
)
from safetensors.torch import save_file

from ipa.engines.errors import IpaError
from ipa.engines.spec import SD15
from ipa.export.changes import BaseChanges, parse_lora
from ipa.export.cli import main
from ipa.export.lora import LoraFile, read_lora
from ipa.export.pipeline import BasePipeline

# Fusing sums the same float32 products in another order; a fused weight of size 1 differs by some 1e-7.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def xl_lora(tiny_xl_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(tiny_xl_base, tmp_path_factory.mktemp("xl_lora"))


@pytest.fixture(scope="module")
def lora(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(tiny_base, tmp_path_factory.mktemp("lora"))


def largest_difference(found: torch.nn.Module, expected: torch.nn.Module) -> float:
    right = expected.state_dict()
    assert found.state_dict().keys() == right.keys()
    return max(
        float((tensor - right[name]).abs().max() / right[name].abs().max())
        for name, tensor in found.state_dict().items()
    )


LAYOUTS: dict[str, Callable[[dict[str, torch.Tensor], Path], Path]] = {
    "peft": lambda state, folder: saved(state, folder / "lora.safetensors"),
    "diffusers": lambda state, folder: saved(as_diffusers(state), folder / "lora.safetensors"),
    "old diffusers": lambda state, folder: saved(as_old_diffusers(state), folder / "lora.safetensors"),
    "kohya": lambda state, folder: saved(as_kohya(state), folder / "lora.safetensors"),
    "pickle": lambda state, folder: as_pickle(as_diffusers(state), folder / "lora.bin"),
    "kohya, sgm": lambda state, folder: saved(as_kohya(state, with_sgm=True), folder / "lora.safetensors"),
    "half precision": lambda state, folder: saved(
        {name: tensor.half() for name, tensor in as_kohya(state).items()}, folder / "lora.safetensors"
    ),
}


def check_fused(base: Path, loras: dict[Path, float | None], is_text_changed: bool = True) -> None:
    """Our weights against those that diffusers' loader fuses, which differ from the base model's."""
    theirs, plain = pipeline(base), pipeline(base)
    for file, scale in loras.items():
        theirs.load_lora_weights(file.parent, weight_name=file.name)
        theirs.fuse_lora(lora_scale=1.0 if scale is None else scale)
        theirs.unload_lora_weights()
    files = tuple(LoraFile(file, scale) for file, scale in loras.items())
    ours = BasePipeline(str(base), None, BaseChanges(loras=files))
    for part in ("unet", *text_encoders(plain)):
        expected = getattr(theirs, part)
        assert largest_difference(getattr(ours, f"load_{part}")(), expected) < TOLERANCE
        assert largest_difference(expected, getattr(plain, part)) > 0.01 or not (part == "unet" or is_text_changed)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "sgm" not in name])
def test_fused_weights_equal_diffusers(layout: str, lora: Path, tiny_base: Path, tmp_path: Path) -> None:
    file = LAYOUTS[layout](weights(lora), tmp_path)
    check_fused(tiny_base, {file: 0.7}, is_text_changed=layout != "old diffusers")


@pytest.mark.parametrize("layout", ["diffusers", "kohya, sgm"])
def test_fused_weights_of_xl_equal_diffusers(layout: str, xl_lora: Path, tiny_xl_base: Path, tmp_path: Path) -> None:
    check_fused(tiny_xl_base, {LAYOUTS[layout](weights(xl_lora), tmp_path): 0.7})


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha_pattern": {"attn2.to_k": 7, "fc1": 5}, "rank_pattern": {"attn2.to_k": 4}}, {"use_rslora": True}],
    ids=["alpha", "patterns", "rslora"],
)
def test_alphas_in_the_header_count(options: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    check_fused(tiny_base, {write_lora(tiny_base, tmp_path, with_metadata=True, **options): None})


def test_alphas_in_the_header_of_an_xl_file_count(tiny_xl_base: Path, tmp_path: Path) -> None:
    options = {"alpha_pattern": {"attn2.to_k": 7, "fc1": 5}}
    check_fused(tiny_xl_base, {write_lora(tiny_xl_base, tmp_path, with_metadata=True, **options): None})


def test_several_loras_add_up(lora: Path, tiny_base: Path, tmp_path: Path) -> None:
    check_fused(tiny_base, {lora: 0.5, write_lora(tiny_base, tmp_path, seed=1): -1.5})


def test_a_kohya_file_without_out_proj_changes_the_text_encoder(lora: Path, tiny_base: Path, tmp_path: Path) -> None:
    """diffusers 0.42 leaves such weights out with a warning, so the formula itself is the reference."""
    state = {
        name: tensor
        for name, tensor in weights(lora).items()
        if name.startswith("text_encoder.") and ("q_proj" in name or "fc1" in name)
    }
    file = saved(as_kohya(state), tmp_path / "lora.safetensors")
    expected = pipeline(tiny_base).text_encoder
    for name, down in state.items():
        if name.endswith("lora_A.weight"):
            layer = name.removeprefix("text_encoder.").removesuffix(".lora_A.weight")
            with torch.no_grad():
                change = state[name.replace("lora_A", "lora_B")] @ down
                expected.get_submodule(layer.removeprefix("text_model.")).weight += 0.7 * ALPHA / RANK * change
    ours = BasePipeline(str(tiny_base), None, BaseChanges(loras=(LoraFile(file, 0.7),)))
    assert largest_difference(ours.load_text_encoder(), expected) < TOLERANCE


class Code:
    def __reduce__(self) -> Any:
        return print, ("this ran",)


KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"
OTHER = "unet.mid_block.attentions.0.transformer_blocks.9.attn2.to_k"
PAIR = {f"{OTHER}.lora_A.weight": torch.zeros(2, 48), f"{OTHER}.lora_B.weight": torch.zeros(96, 2)}


TE2 = {f"text_encoder_2.x.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}


def xl(state: dict[str, torch.Tensor], folder: Path) -> Path:
    """SDXL's text is 2048 wide; names are much the same."""
    return saved({**state, KEY: torch.zeros(RANK, 2048)}, folder / "xl.safetensors")


BAD: dict[str, tuple[Callable[[dict[str, torch.Tensor], Path], Path], str]] = {
    "missing": (lambda _, folder: folder / "no.safetensors", "no such file"),
    "no weight file": (lambda _, folder: folder, "no such file"),
    "pickle": (lambda _, folder: as_pickle({"x": Code()}, folder / "x.pt"), "would run code when loaded"),  # type: ignore[dict-item]
    "xl by width": (xl, "changes a layer of size 2048 to 96, this base model has 48 to 96"),
    "xl by layers": (lambda state, folder: saved(PAIR, folder / "x.safetensors"), "does not have"),
    "xl by text encoder": (
        lambda state, folder: saved(as_kohya(TE2), folder / "x.safetensors"),
        "a text encoder that Stable Diffusion XL alone has; use a LoRA made for Stable Diffusion 1.x",
    ),
    "loha": (
        lambda state, folder: saved({"lora_unet_x.hada_w1_a": torch.zeros(2, 2)}, folder / "x.safetensors"),
        "hada is not supported",
    ),
    "half": (
        lambda state, folder: saved({KEY: state[KEY]}, folder / "x.safetensors"),
        "one matrix and not two",
    ),
    "nan": (
        lambda state, folder: saved({**state, KEY: state[KEY] * float("nan")}, folder / "x.safetensors"),
        "not finite",
    ),
    "adapter": (
        lambda state, folder: saved({"image_proj.proj.weight": torch.zeros(2, 2)}, folder / "x.safetensors"),
        "none of the layouts",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_a_lora(case: str, lora: Path, tiny_base: Path, tmp_path: Path) -> None:
    make, message = BAD[case]
    arguments = [
        "--base",
        str(tiny_base),
        "--lora",
        str(make(weights(lora), tmp_path)),
        "--output",
        str(tmp_path / "o"),
    ]
    result = CliRunner().invoke(main, ["onnx", *arguments])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "o").exists()
    assert "this ran" not in result.output  # where `print` ends up


MATRICES = {KEY: torch.zeros(2, 48), KEY.replace("_A", "_B"): torch.zeros(96, 2)}
LAYER = "lora_unet_x"
DAMAGED: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "a vector": ({KEY: torch.zeros(2)}, {}, "has the shape \\(2,\\), expected a matrix"),
    "no rank": ({KEY: torch.zeros(0, 48)}, {}, "expected a matrix"),
    "two alphas": ({f"{LAYER}.alpha": torch.zeros(2)}, {}, "expected one number"),
    "float8": ({KEY: torch.full((2, 2), torch.nan).to(torch.float8_e4m3fn)}, {}, "not finite"),
    "nan alpha": (MATRICES, {"unet.lora_alpha": float("nan")}, "no usable alpha"),
    "text alpha": (MATRICES, {"unet.lora_alpha": "much"}, "no usable alpha"),
    "a list": (MATRICES, {"unet.alpha_pattern": [1]}, "no usable alpha"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_lora_is_one_message(case: str, tmp_path: Path) -> None:
    state, options, message = DAMAGED[case]
    save_file(state, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(options)} if options else None)
    with pytest.raises(IpaError, match=message):
        read_lora(LoraFile(tmp_path / "x.safetensors"), SD15)


TO_Q = "mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("layers", "width", "message"),
    [
        (("unet_down_blocks_0_attentions_0_proj_in",), 72, "does not have; use a LoRA made for Stable Diffusion XL"),
        ((f"unet_{TO_Q}",), 48, "changes a layer of size 48 to 48, this base model has 72 to 72"),
        ((f"unet_{TO_Q}", f"unet_{TO_Q.replace('mid_block_attentions_0', 'middle_block_1')}"), 72, "names unet."),
        (("te2_text_model_encoder_layers_9_mlp_fc1",), 72, "text_encoder_2.encoder_layers_9_mlp_fc1, which this base"),
    ],
    ids=["1.x by layers", "another width", "twice", "another text encoder"],
)
def test_refuses_a_lora_for_xl(
    layers: tuple[str, ...], width: int, message: str, tiny_xl_base: Path, tmp_path: Path
) -> None:
    matrices = {"down": torch.zeros(2, width), "up": torch.zeros(width, 2)}
    state = {f"lora_{name}.lora_{side}.weight": tensor.clone() for name in layers for side, tensor in matrices.items()}
    file = saved(state, tmp_path / "x.safetensors")
    arguments = ["--base", str(tiny_xl_base), "--lora", str(file), "--output", str(tmp_path / "o")]
    result = CliRunner().invoke(main, ["onnx", *arguments])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_scale_follows_the_last_equals_sign(tmp_path: Path) -> None:
    assert parse_lora("a/b.safetensors") == LoraFile(Path("a/b.safetensors"))
    assert parse_lora("a=b.safetensors=-0.5") == LoraFile(Path("a=b.safetensors"), -0.5)
    (tmp_path / "x=0.5").touch()
    assert parse_lora(f"{tmp_path}/x=0.5") == LoraFile(tmp_path / "x=0.5")
    for scale in ("nan", "inf", "much", ""):
        with pytest.raises(IpaError, match="no finite number"):
            parse_lora(f"a.safetensors={scale}")


def test_the_record_names_file_hash_and_scale(lora: Path) -> None:
    record = read_lora(LoraFile(lora, 0.25), SD15).record
    assert (record.name, record.scale, len(record.sha256)) == ("pytorch_lora_weights.safetensors", 0.25, 64)
