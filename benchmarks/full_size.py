"""A full-size Stable Diffusion 1.5 or XL with random weights, its image encoder and an adapter: for memory and speed.

Every size is that of the published models (859.5 M parameters in the UNet, ViT-H/14, 22 M in the adapter; of XL 2567 M,
the image encoder of `ip-adapter_sdxl_vit-h`, 349 M); the weights come from a seed, so nothing is downloaded and no
picture means anything. The tokenizer is the demo's, padded to 77.

    python -m ipa.benchmarks.full_size --output /tmp/sd15
    python -m ipa.benchmarks.full_size --family sdxl --dtype float16 --output /tmp/sdxl
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import click

TOKENS, PLUS_TOKENS, TEXT_WIDTH, EMBED_WIDTH = 4, 16, 768, 1024
SD15_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 8,
}
SD15_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 512,
}
# OpenAI's ViT-L/14 text model and OpenCLIP's ViT-H/14 image model, as SD1.5 and IP-Adapter use them.
CLIP_TEXT = {
    "vocab_size": 49408,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": TEXT_WIDTH,
}
CLIP_VISION = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": EMBED_WIDTH,
    "hidden_act": "gelu",
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SDXL_TEXT_WIDTH = 2048
SDXL_UNET = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": SDXL_TEXT_WIDTH,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
}
SDXL_VAE = {**SD15_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
# OpenCLIP's ViT-bigG/14 text model.
CLIP_TEXT_2 = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
    "eos_token_id": 2,  # the published file's, of before transformers knew better: the largest id ends the text
}
SDXL_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Sizes:
    """Configurations of the models, as keywords of their classes; `text_2` in Stable Diffusion XL alone."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    text_2: Mapping[str, Any] | None = None


FULL = Sizes(SD15_UNET, SD15_VAE, CLIP_TEXT, CLIP_VISION)
FULL_XL = Sizes(SDXL_UNET, SDXL_VAE, CLIP_TEXT, CLIP_VISION, CLIP_TEXT_2)
# The same structure for a trial of seconds.
SMALL = Sizes(
    {
        **SD15_UNET,
        "block_out_channels": (32, 64, 96, 96),
        "cross_attention_dim": 128,
        "norm_num_groups": 8,
        "sample_size": 32,
    },
    {**SD15_VAE, "block_out_channels": (16, 16, 32, 32), "norm_num_groups": 8, "sample_size": 256},
    {**CLIP_TEXT, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    {**CLIP_VISION, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
)


def write_pipeline(folder: Path, seed: int = 0, sizes: Sizes = FULL, dtype: str = "float32") -> None:
    """Write the pipeline's folder, `image_encoder/` included, one model at a time.

    Args:
        dtype: of the weights in the files.
    """
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    makers: dict[str, Callable[[], Any]] = {
        "unet": lambda: UNet2DConditionModel(**sizes.unet),
        "vae": lambda: AutoencoderKL(**sizes.vae),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**sizes.text)),
        "image_encoder": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes.vision)),
    }
    if sizes.text_2 is not None:
        config = CLIPTextConfig(**sizes.text_2)
        makers["text_encoder_2"] = lambda: CLIPTextModelWithProjection(config)
    torch.manual_seed(seed)
    usual = torch.get_default_dtype()
    for part, make in makers.items():
        torch.set_default_dtype(getattr(torch, dtype))  # made so, a large one is never in memory as float32
        try:
            make().save_pretrained(folder / part)
        finally:
            torch.set_default_dtype(usual)
    if sizes.text_2 is None:
        PNDMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    else:
        EulerDiscreteScheduler(**SDXL_SCHEDULER).save_pretrained(folder / "scheduler")
        _write_tokenizer(folder / "tokenizer_2", pad_token="!")
    _write_tokenizer(folder / "tokenizer")
    _write_index(folder, is_xl=sizes.text_2 is not None)


def _write_tokenizer(folder: Path, **options: str) -> None:
    from transformers import CLIPTokenizer

    from ipa.engines.bundle import Bundle
    from ipa.runtime.demo import demo_bundle

    bundle = Bundle.open(demo_bundle())
    file = str(bundle.file(bundle.manifest.tokenizer))
    CLIPTokenizer(tokenizer_file=file, model_max_length=77, **options).save_pretrained(folder)


def _write_index(folder: Path, is_xl: bool) -> None:
    import json

    classes = {
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "scheduler": ("diffusers", "EulerDiscreteScheduler" if is_xl else "PNDMScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
        "feature_extractor": (None, None),
    }
    index: dict[str, Any]
    if is_xl:
        index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
        classes["text_encoder_2"] = ("transformers", "CLIPTextModelWithProjection")
        classes["tokenizer_2"] = ("transformers", "CLIPTokenizer")
    else:
        index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
        classes["safety_checker"] = (None, None)
    (folder / "model_index.json").write_text(json.dumps(index | classes, indent=1))


def write_adapter(
    file: Path, seed: int = 0, sizes: Sizes = FULL, dtype: str = "float32", is_plus: bool = False
) -> None:
    """Write an adapter in the official layout: of the kind base with 4 tokens, or plus with 16.

    At full size 3,150,336 + 19,169,280 parameters.
    """
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    from ipa.export.adapter_modules import LinearProjection, Resampler
    from ipa.export.hoist import kv_layout

    torch.manual_seed(seed)
    with torch.device("meta"):
        layout = kv_layout(UNet2DConditionModel(**sizes.unet))
    text_width = sizes.unet["cross_attention_dim"]
    projection: Any
    if is_plus:  # the published one's sizes: ip-adapter-plus_sd15
        hidden_width = sizes.vision["hidden_size"]
        projection = Resampler(hidden_width, PLUS_TOKENS, text_width, text_width, text_width, 4 * text_width, 4)
        torch.nn.init.normal_(projection.latents)
    else:
        projection = LinearProjection(sizes.vision["projection_dim"], TOKENS, text_width)
    weights = {f"image_proj.{name}": weight for name, weight in projection.state_dict().items()}
    for index, layer_width in enumerate(layout.widths):
        for which in ("k", "v"):
            weights[f"ip_adapter.{2 * index + 1}.to_{which}_ip.weight"] = 0.03 * torch.randn(layer_width, text_width)
    save_file({key: weight.to(getattr(torch, dtype)).contiguous() for key, weight in weights.items()}, file)


def write_controlnet(folder: Path, seed: int = 0, sizes: Sizes = FULL, dtype: str = "float32") -> None:
    """Write a ControlNet for the base model, in diffusers format; its last layers are random, not zero."""
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    with torch.device("meta"):
        config = UNet2DConditionModel(**sizes.unet).config
    torch.manual_seed(seed)
    known = signature(ControlNetModel.__init__).parameters
    controlnet = ControlNetModel(**{name: value for name, value in config.items() if name in known})
    for weight in controlnet.parameters():
        if not weight.any():  # the published ones begin so; zeros would be no measure
            torch.nn.init.normal_(weight, std=0.02)
    controlnet.to(getattr(torch, dtype)).save_pretrained(folder)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder; 7 to 17 GB are written.")
@click.option("--seed", default=0, help="Of all weights.")
@click.option("--family", type=click.Choice(["sd15", "sdxl"]), default="sd15", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True)
def main(output: Path, seed: int, family: str, dtype: str) -> None:
    """Write OUTPUT/base and OUTPUT/ip-adapter.safetensors."""
    sizes = FULL_XL if family == "sdxl" else FULL
    write_pipeline(output / "base", seed, sizes, dtype)
    write_adapter(output / "ip-adapter.safetensors", seed, sizes, dtype)


if __name__ == "__main__":
    main()
