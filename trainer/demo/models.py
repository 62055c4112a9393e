"""The networks: Stable Diffusion 1.5's block structure, shrunk until two CPU cores can train it."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ipa.trainer.demo.shapes import IMAGE_SIZE
from ipa.trainer.demo.tokenizer import MAX_LENGTH

LATENT_SIZE = IMAGE_SIZE // 8
VISION_SIZE = 64
WIDTH = 128  # of both CLIP towers and of their shared embedding
SCALING_FACTOR = 0.18215  # Stable Diffusion's; the latents are whitened to fit it


def build_vae() -> AutoencoderKL:
    """A factor-8 autoencoder. One normalisation group: small groups erase flat colour."""
    channels = (16, 24, 48, 64)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=IMAGE_SIZE,
        scaling_factor=SCALING_FACTOR,
    )


def build_unet() -> UNet2DConditionModel:
    """4.6 million parameters in three levels with cross-attention and one without, as in SD 1.5.

    Heads of 28 to 48 channels: narrower ones spend most of the training time in attention.
    """
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(48, 64, 96, 112),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=(1, 2, 3, 4),
        norm_num_groups=8,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """CLIP's text tower with the projection that only its own training uses."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_image_encoder() -> CLIPVisionModelWithProjection:
    """CLIP's image tower on 64-pixel images in patches of 8."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=VISION_SIZE,
            patch_size=8,
            projection_dim=WIDTH,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """SD 1.5's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )


def signal_to_noise() -> torch.Tensor:
    """alpha / (1 - alpha) of the 1000 training timesteps."""
    alphas: torch.Tensor = build_scheduler().alphas_cumprod
    return alphas / (1 - alphas)
