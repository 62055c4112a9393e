"""diffusers' weight names turned back into the original layout of Stable Diffusion 1.x and XL, for tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

Rule = tuple[str, str | Callable[[re.Match[str]], str]]

_UNET_RESNET: Sequence[Rule] = (
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)
# Two layers per block: three entries of `input_blocks`, and of `output_blocks`, each.
_UNET: Sequence[Rule] = (
    (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"^add_embedding\.linear_(\d)", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.0"),
    (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.1"),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op"),
    (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.0"),
    (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.1"),
    (r"^up_blocks\.(\d)\.upsamplers\.0\.conv", lambda m: f"output_blocks.{3 * int(m[1]) + 2}.2.conv"),
)
# Nothing stands before the upsampler in a block without attention, the first on the way up in 1.x.
_SD15_UPSAMPLER = (r"^output_blocks\.2\.2\.conv", "output_blocks.2.1.conv")
_OPEN_CLIP: Sequence[Rule] = (
    (r"^text_model\.", ""),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"^final_layer_norm", "ln_final"),
    (r"encoder\.layers", "transformer.resblocks"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"self_attn", "attn"),
    (r"fc1", "c_fc"),
    (r"fc2", "c_proj"),
)
_VAE: Sequence[Rule] = (
    (r"conv_norm_out", "norm_out"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"group_norm", "norm"),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0", "proj_out"),
    (r"conv_shortcut", "nin_shortcut"),
)


def original_state_dict(pipe: Any) -> dict[str, torch.Tensor]:
    """The weights of a `StableDiffusionPipeline` or `StableDiffusionXLPipeline`, under their original names."""
    is_xl = hasattr(pipe, "text_encoder_2")
    rules = () if is_xl else (_SD15_UPSAMPLER,)
    found = {f"model.diffusion_model.{_renamed(unet_name(k), rules)}": v for k, v in pipe.unet.state_dict().items()}
    found |= {f"first_stage_model.{name}": tensor for name, tensor in original_vae(pipe.vae).items()}
    text = f"{'conditioner.embedders.0' if is_xl else 'cond_stage_model'}.transformer.text_model."
    found |= {text + k.removeprefix("text_model."): v for k, v in pipe.text_encoder.state_dict().items()}
    if is_xl:
        found |= {f"conditioner.embedders.1.model.{k}": v for k, v in open_clip(pipe.text_encoder_2).items()}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def open_clip(text_encoder: Any) -> dict[str, torch.Tensor]:
    """The weights of a `CLIPTextModelWithProjection` as OpenCLIP names them: queries, keys and values in one matrix."""
    found = {}
    state = text_encoder.state_dict()
    for name, tensor in state.items():
        renamed = _renamed(name, _OPEN_CLIP)
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif ".q_proj." in name:
            parts = [state[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            found[renamed.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            found[renamed] = tensor
    return {**found, "logit_scale": torch.tensor(4.6)}  # of CLIP's training


def original_vae(vae: Any) -> dict[str, torch.Tensor]:
    """The weights of an `AutoencoderKL` under their original names; its attention was made of 1x1 convolutions."""

    def convert() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in vae.state_dict().items():
            renamed = _renamed(name, _VAE)
            is_matrix = ".attn_1." in renamed and tensor.ndim == 2
            yield renamed, (tensor[..., None, None] if is_matrix else tensor).contiguous()

    return dict(convert())


def write_checkpoint(base: Path, file: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a pipeline folder as one file, `.safetensors` or `.ckpt`."""
    pipe = DiffusionPipeline.from_pretrained(base, local_files_only=True)
    state = {name: tensor.to(dtype) for name, tensor in original_state_dict(pipe).items()}
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state, "global_step": 1}, file)
    return file


def unet_name(name: str) -> str:
    """A UNet's weight; the upsampler as behind an attention."""
    renamed = _renamed(name, _UNET)
    return _renamed(renamed, _UNET_RESNET) if ".resnets." in name else renamed


def _renamed(name: str, rules: Sequence[Rule]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
