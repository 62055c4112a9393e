"""Random Stable Diffusion XL pipelines of the true structure, small enough for tests.

Three UNet blocks, the first without attention, several transformer layers in one, linear projections, pooled text and
sizes beside the timestep; two text encoders of different widths, whose tokenizers pad with different tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tiny import IMAGE_SIZE, shake, tiny_image_encoder, tiny_tokenizer
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

TEXT_WIDTHS = (24, 40)
TEXT_EMBED_WIDTH = 36
TIME_EMBED = 8
WIDTHS = (24, 48, 72)


def tiny_xl_pipeline(
    folder: Path, seed: int = 0, force_upcast: bool = True, in_channels: int = 4, **options: Any
) -> Path:
    """Write a pipeline folder as diffusers saves it, `image_encoder` and `feature_extractor` included.

    Args:
        folder: where; made when missing.
        seed: of all weights.
        force_upcast: of the VAE.
        in_channels: of the UNet; 9 in inpainting models.
        **options: of the pipeline.
    Returns:
        `folder`.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=WIDTHS,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        norm_num_groups=8,
        cross_attention_dim=sum(TEXT_WIDTHS),
        attention_head_dim=(2, 4, 6),  # heads; of size 12 in all blocks
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_EMBED,
        projection_class_embeddings_input_dim=TEXT_EMBED_WIDTH + 6 * TIME_EMBED,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=128,
        scaling_factor=0.13025,
        force_upcast=force_upcast,
    )
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
    text_encoder = CLIPTextModel(_text_config(len(tokenizer), TEXT_WIDTHS[0], "quick_gelu"))
    text_encoder_2 = CLIPTextModelWithProjection(_text_config(len(tokenizer), TEXT_WIDTHS[1], "gelu"))
    image_encoder = tiny_image_encoder()
    for model in (unet, vae, text_encoder, text_encoder_2, image_encoder):
        shake(model)
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        image_encoder=image_encoder,
        feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        add_watermarker=False,
        **options,
    ).save_pretrained(folder)
    return folder


def _text_config(vocabulary: int, width: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=TEXT_EMBED_WIDTH,
        hidden_act=activation,
        # As in the published files: transformers then takes the largest id for the end of the text.
        eos_token_id=2,
    )
