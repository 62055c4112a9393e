"""`--lora`: weights with LoRAs added, against diffusers' `load_lora_weights` and `fuse_lora` (which need peft)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from ipa.engines.errors import IpaError
from ipa.export.changes import BaseChanges, parse_lora
from ipa.export.cli import main
from ipa.export.lora import LoraFile, read_lora
from ipa.export.pipeline import BasePipeline

UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "conv_shortcut"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
RANK, ALPHA = 3, 2.0
# Fusing sums the same float32 products in another order; a fused weight of size 1 differs by some 1e-7.
TOLERANCE = 1e-5


def pipeline(base: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(base, local_files_only=True)


def weights(file: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_file(file)
    return state


def write_lora(base: Path, folder: Path, seed: int = 0, with_metadata: bool = False, **options: Any) -> Path:
    """A random LoRA of UNet and text encoder as diffusers' own `save_lora_weights` writes it."""
    torch.manual_seed(seed)
    pipe = pipeline(base)
    options = {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": False, **options}
    pipe.unet.add_adapter(LoraConfig(target_modules=UNET_LAYERS, **options))
    pipe.text_encoder.add_adapter(LoraConfig(target_modules=TEXT_LAYERS, **options))
    metadata = {}
    if with_metadata:
        for part in ("unet", "text_encoder"):
            config = getattr(pipe, part).peft_config["default"].to_dict()
            metadata[f"{part}_lora_adapter_metadata"] = {
                k: list(v) if isinstance(v, set) else v for k, v in config.items()
            }
    pipe.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        **metadata,
    )
    return folder / "pytorch_lora_weights.safetensors"


def as_diffusers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`lora.down`/`lora.up` in the UNet, `lora_linear_layer` in the text encoder."""
    unet = {k: v for k, v in state.items() if k.startswith("unet.")}
    text = convert_state_dict_to_diffusers({k: v for k, v in state.items() if k.startswith("text_encoder.")})
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


def as_kohya(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Underscores for dots, and an alpha for each layer."""
    found = {}
    for key, tensor in state.items():
        layer, _, side = key.removesuffix(".weight").rpartition(".")
        part, _, layer = layer.partition(".")
        if part == "text_encoder" and not layer.startswith("text_model."):
            layer = f"text_model.{layer}"
        name = f"lora_{'te' if part == 'text_encoder' else 'unet'}_{layer.replace('.', '_')}"
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
    "half precision": lambda state, folder: saved(
        {name: tensor.half() for name, tensor in as_kohya(state).items()}, folder / "lora.safetensors"
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_weights_equal_diffusers(layout: str, lora: Path, tiny_base: Path, tmp_path: Path) -> None:
    file = LAYOUTS[layout](weights(lora), tmp_path)
    theirs, plain = pipeline(tiny_base), pipeline(tiny_base)
    theirs.load_lora_weights(file.parent, weight_name=file.name)
    theirs.fuse_lora(lora_scale=0.7)
    theirs.unload_lora_weights()
    ours = BasePipeline(str(tiny_base), None, BaseChanges(loras=(LoraFile(file, 0.7),)))
    assert largest_difference(ours.load_unet(), theirs.unet) < TOLERANCE
    assert largest_difference(ours.load_text_encoder(), theirs.text_encoder) < TOLERANCE
    assert largest_difference(theirs.unet, plain.unet) > 0.01
    if layout != "old diffusers":
        assert largest_difference(theirs.text_encoder, plain.text_encoder) > 0.01


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha_pattern": {"attn2.to_k": 7, "fc1": 5}, "rank_pattern": {"attn2.to_k": 4}}, {"use_rslora": True}],
    ids=["alpha", "patterns", "rslora"],
)
def test_alphas_in_the_header_count(options: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    file = write_lora(tiny_base, tmp_path, with_metadata=True, **options)
    theirs = pipeline(tiny_base)
    theirs.load_lora_weights(file.parent, weight_name=file.name)
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    ours = BasePipeline(str(tiny_base), None, BaseChanges(loras=(LoraFile(file),)))
    assert largest_difference(ours.load_unet(), theirs.unet) < TOLERANCE
    assert largest_difference(ours.load_text_encoder(), theirs.text_encoder) < TOLERANCE


def test_several_loras_add_up(lora: Path, tiny_base: Path, tmp_path: Path) -> None:
    second = write_lora(tiny_base, tmp_path, seed=1)
    theirs = pipeline(tiny_base)
    for file, scale in ((lora, 0.5), (second, -1.5)):
        theirs.load_lora_weights(file.parent, weight_name=file.name)
        theirs.fuse_lora(lora_scale=scale)
        theirs.unload_lora_weights()
    ours = BasePipeline(str(tiny_base), None, BaseChanges(loras=(LoraFile(lora, 0.5), LoraFile(second, -1.5))))
    assert largest_difference(ours.load_unet(), theirs.unet) < TOLERANCE
    assert largest_difference(ours.load_text_encoder(), theirs.text_encoder) < TOLERANCE


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
        lambda state, folder: saved({"lora_te2_x.lora_down.weight": torch.zeros(2, 2)}, folder / "x.safetensors"),
        "Stable Diffusion XL",
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


def test_a_scale_follows_the_last_equals_sign(tmp_path: Path) -> None:
    assert parse_lora("a/b.safetensors") == LoraFile(Path("a/b.safetensors"))
    assert parse_lora("a=b.safetensors=-0.5") == LoraFile(Path("a=b.safetensors"), -0.5)
    (tmp_path / "x=0.5").touch()
    assert parse_lora(f"{tmp_path}/x=0.5") == LoraFile(tmp_path / "x=0.5")
    for scale in ("nan", "inf", "much", ""):
        with pytest.raises(IpaError, match="no finite number"):
            parse_lora(f"a.safetensors={scale}")


def test_the_record_names_file_hash_and_scale(lora: Path) -> None:
    record = read_lora(LoraFile(lora, 0.25)).record
    assert (record.name, record.scale, len(record.sha256)) == ("pytorch_lora_weights.safetensors", 0.25, 64)
