"""The trained parts as a diffusers pipeline folder, as Stable Diffusion 1.5 lies on disk."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ipa.trainer.demo.clip import build_image_processor
from ipa.trainer.demo.files import atomic_folder
from ipa.trainer.demo.models import build_scheduler


def save_pipeline(
    folder: Path,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    image_encoder: CLIPVisionModelWithProjection,
) -> None:
    """Write the pipeline, with the image encoder and its preprocessing in `image_encoder/`."""
    pipeline = StableDiffusionPipeline(
        vae=vae.to(memory_format=torch.contiguous_format),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as temporary:
        pipeline.save_pretrained(temporary)
        image_encoder.save_pretrained(temporary / "image_encoder")
        build_image_processor().save_pretrained(temporary / "image_encoder")
