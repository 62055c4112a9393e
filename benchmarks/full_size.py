"""A full-size Stable Diffusion 1.5 with random weights, its image encoder and an adapter: for memory and speed.

Every size is that of the published models (859.5 M parameters in the UNet, ViT-H/14, 22 M in the adapter); the weights
come from a seed, so nothing is downloaded and no picture means anything. The tokenizer is the demo's, padded to 77.

    python -m ipa.benchmarks.full_size --output /tmp/sd15
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

TOKENS, TEXT_WIDTH, EMBED_WIDTH = 4, 768, 1024
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


@dataclass(frozen=True)
class Sizes:
    """Configurations of the four models, as keywords of their classes."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Any]
    vision: Mapping[str, Any]


FULL = Sizes(SD15_UNET, SD15_VAE, CLIP_TEXT, CLIP_VISION)
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


def write_pipeline(folder: Path, seed: int = 0, sizes: Sizes = FULL) -> None:
    """Write the pipeline's folder, `image_encoder/` included, one model at a time."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    UNet2DConditionModel(**sizes.unet).save_pretrained(folder / "unet")
    AutoencoderKL(**sizes.vae).save_pretrained(folder / "vae")
    CLIPTextModel(CLIPTextConfig(**sizes.text)).save_pretrained(folder / "text_encoder")
    CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes.vision)).save_pretrained(folder / "image_encoder")
    PNDMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    _write_tokenizer(folder / "tokenizer")
    _write_index(folder)


def _write_tokenizer(folder: Path) -> None:
    from transformers import CLIPTokenizer

    from ipa.engines.bundle import Bundle
    from ipa.runtime.demo import demo_bundle

    bundle = Bundle.open(demo_bundle())
    file = str(bundle.file(bundle.manifest.tokenizer))
    CLIPTokenizer(tokenizer_file=file, model_max_length=77).save_pretrained(folder)


def _write_index(folder: Path) -> None:
    import json

    classes = {
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "scheduler": ("diffusers", "PNDMScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
        "safety_checker": (None, None),
        "feature_extractor": (None, None),
    }
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **classes}
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))


def write_adapter(file: Path, seed: int = 0, sizes: Sizes = FULL) -> None:
    """Write a base-kind adapter of 4 tokens in the official layout: 3,150,336 + 19,169,280 parameters if full."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    from ipa.export.hoist import kv_layout

    with torch.device("meta"):
        layout = kv_layout(UNet2DConditionModel(**sizes.unet))
    text_width, embed_width = sizes.unet["cross_attention_dim"], sizes.vision["projection_dim"]
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "image_proj.proj.weight": (TOKENS * text_width, embed_width),
        "image_proj.proj.bias": (TOKENS * text_width,),
        "image_proj.norm.weight": (text_width,),
        "image_proj.norm.bias": (text_width,),
    }
    for index, layer_width in enumerate(layout.widths):
        for which in ("k", "v"):
            shapes[f"ip_adapter.{2 * index + 1}.to_{which}_ip.weight"] = (layer_width, text_width)
    weights = {key: torch.randn(shape, generator=generator) * 0.03 for key, shape in shapes.items()}
    # As training starts: with a random gain the tokens would be too small to tell one image from another.
    weights["image_proj.norm.weight"] = torch.ones(text_width)
    weights["image_proj.norm.bias"] = torch.zeros(text_width)
    save_file(weights, file)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder; some 7 GB are written.")
@click.option("--seed", default=0, help="Of all weights.")
def main(output: Path, seed: int) -> None:
    """Write OUTPUT/base and OUTPUT/ip-adapter.safetensors."""
    write_pipeline(output / "base", seed)
    write_adapter(output / "ip-adapter.safetensors", seed)


if __name__ == "__main__":
    main()
