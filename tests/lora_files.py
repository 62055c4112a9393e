"""LoRA files in every layout, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from original_layout import unet_name
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "conv_shortcut"]
# What sgm names in another way, too.
XL_UNET_LAYERS = [*UNET_LAYERS, "conv2", "time_emb_proj", "linear_1", "linear_2", "conv_in", "conv_out", "conv"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
RANK, ALPHA = 3, 2.0


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
