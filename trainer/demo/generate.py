"""Images of the evaluation pairs, made with diffusers from a pipeline folder and an adapter."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm
from transformers import CLIPVisionModelWithProjection

from ipa.trainer.demo.clip import build_image_processor
from ipa.trainer.demo.evaluate import Pair

STEPS = 25
GUIDANCE_SCALE = 5.0


def load_with_adapter(pipeline: Path, adapter: Path) -> StableDiffusionPipeline:
    """The pipeline in `pipeline`, with the adapter file and the image encoder beside it."""
    encoder = CLIPVisionModelWithProjection.from_pretrained(pipeline / "image_encoder")
    loaded = StableDiffusionPipeline.from_pretrained(
        pipeline, safety_checker=None, image_encoder=encoder, feature_extractor=build_image_processor()
    )
    loaded.load_ip_adapter(str(adapter.parent), subfolder="", weight_name=adapter.name)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def generate(
    loaded: StableDiffusionPipeline, pairs: Sequence[Pair], scale: float, guidance_scale: float = GUIDANCE_SCALE
) -> list[Image.Image]:
    """One image per pair; image i starts from the noise of seed i, whatever the scale.

    Pair by pair: in a batch, diffusers shows every image prompt to every text.
    """
    loaded.set_ip_adapter_scale(scale)
    return [
        loaded(
            prompt=pair.prompt,
            ip_adapter_image=pair.reference,
            num_inference_steps=STEPS,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        for seed, pair in enumerate(tqdm(pairs, desc=f"images at scale {scale}", unit="image"))
    ]
