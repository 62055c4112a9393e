"""`--lora`: weights with LoRAs added, against diffusers' `load_lora_weights` and `fuse_lora` (which need peft)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from original_layout import unet_name
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from ipa.engines.errors import IpaError
from ipa.engines.spec import SD15
from ipa.export.changes import BaseChanges, parse_lora
from ipa.export.cli import main
from ipa.export.lora import LoraFile, read_lora
from ipa.export.pipeline import BasePipeline

UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "conv_shortcut"]
# What sgm names in another way, too.
XL_UNET_LAYERS = [*UNET_LAYERS, "conv2", "time_emb_proj", "linear_1", "linear_2", "conv_in", "conv_out", "conv"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
RANK, ALPHA = 3, 2.0
# Fusing sums the same float32 products in another order; a fused weight of size 1 differs by some 1e-7.
TOLERANCE = 1e-5


def pipeline(base: Path) -> Any:
    return DiffusionPipeline.from_pretrained(base, local_files_only=True)


def text_encoders(pipe: Any) -> list[str]:
    return [name for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)]


def weights(file: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_file(file)
    return state


def write_lora(base: Path, folder: Path, seed: int = 0, with_metadata: bool = False, **options: Any) -> Path:
    """A random LoRA of UNet and text encoders as diffusers' own `save_lora_weights` writes it."""
    torch.manual_seed(seed)
    pipe = pipeline(base)
    encoders = text_encoders(pipe)
    unet_layers = XL_UNET_LAYERS if len(encoders) > 1 else UNET_LAYERS
    options = {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": False, **options}
    pipe.unet.add_adapter(LoraConfig(target_modules=unet_layers, **options))
    for part in encoders:
        getattr(pipe, part).add_adapter(LoraConfig(target_modules=TEXT_LAYERS, **options))
    metadata = {}
    if with_metadata:
        for part in ("unet", *encoders):
            config = getattr(pipe, part).peft_config["default"].to_dict()
            metadata[f"{part}_lora_adapter_metadata"] = {
                k: list(v) if isinstance(v, set) else v for k, v in config.items()
            }
    pipe.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        **{f"{part}_lora_layers": get_peft_model_state_dict(getattr(pipe, part)) for part in encoders},
        **metadata,
    )
    return folder / "pytorch_lora_weights.safetensors"


def as_diffusers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`lora.down`/`lora.up` in the UNet, `lora_linear_layer` in the text encoder."""
    unet = {k: v for k, v in state.items() if k.startswith("unet.")}
    text = convert_state_dict_to_diffusers({k: v for k, v in state.items() if k.startswith("text_encoder")})
    return {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in unet.items()} | {
        k.replace(".lora_A", ".lora_linear_layer.down").replace(".lora_B", ".lora_linear_layer.up"): v
        for k, v in text.items()
    }


def as_old_diffusers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Attention processors with matrices of their own, of the UNet alone, as in 2023."""
    found = {}
    for key, tensor in state.items():
        if not key.startswith("unet.") or ".attn" not in key:
            continue
        key = key.replace("to_out.0", "to_out")
        for name in ("to_q", "to_k", "to_v", "to_out"):
            key = key.replace(f".{name}.lora_A.", f".processor.{name}_lora.down.")
            key = key.replace(f".{name}.lora_B.", f".processor.{name}_lora.up.")
        found[key] = tensor
    return found


def as_kohya(state: dict[str, torch.Tensor], with_sgm: bool = False) -> dict[str, torch.Tensor]:
    """Underscores for dots, and an alpha for each layer.

    Args:
        with_sgm: name the UNet's layers as in the original code of Stable Diffusion XL.
    """
    is_xl = any(key.startswith("text_encoder_2.") for key in state)
    names = {"unet": "unet", "text_encoder": "te1" if is_xl else "te", "text_encoder_2": "te2"}
    found = {}
    for key, tensor in state.items():
        layer, _, side = key.removesuffix(".weight").rpartition(".")
        part, _, layer = layer.partition(".")
        if part != "unet" and not layer.startswith("text_model."):
            layer = f"text_model.{layer}"
        if part == "unet" and with_sgm:
            layer = unet_name(f"{layer}.").removesuffix(".")
        name = f"lora_{names[part]}_{layer.replace('.', '_')}"
        found[f"{name}.lora_{'down' if side == 'lora_A' else 'up'}.weight"] = tensor
        found[f"{name}.alpha"] = torch.tensor(ALPHA)
    return found


def as_pickle(state: dict[str, torch.Tensor], file: Path) -> Path:
    torch.save(state, file)
    return file


def saved(state: dict[str, torch.Tensor], file: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    return file


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
