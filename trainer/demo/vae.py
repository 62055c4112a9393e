"""Stage 1: the autoencoder between 128-pixel images and 4 x 16 x 16 latents."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss

from ipa.trainer.demo.dataset import Dataset
from ipa.trainer.demo.loop import Budget, Optimisation, fit
from ipa.trainer.demo.models import SCALING_FACTOR, build_vae
from ipa.trainer.demo.shapes import IMAGE_SIZE

CROP = 64
CROP_SHARE = 0.55  # of the budget that trains on crops, at a quarter of the cost
BATCH = 8
KL_WEIGHT = 3e-4
EDGE_WEIGHT = 0.5
FIRST_LOGVAR = -5.0
# Noise on the latents that are decoded, at most, against their spread. An encoder that is trained with it spreads
# what it says over neighbours (arXiv:2507.15856); a decoder draws clean shapes of the latents of a UNet, never exact.
ENCODER_NOISE = 0.3
DECODER_NOISE = 0.5


def as_pixels(images: np.ndarray) -> Tensor:
    """(n, h, w, 3) uint8 as (n, 3, h, w) float32 in -1 to 1."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(dataset: Dataset, budget: Budget, checkpoint: Path, seed: int = 0) -> AutoencoderKL:
    """Train the autoencoder, on crops and then on whole images, and whiten its latents."""
    torch.manual_seed(seed)
    vae = build_vae().to(memory_format=torch.channels_last)
    latent_channels = vae.config.latent_channels
    torch.nn.init.constant_(vae.quant_conv.bias[latent_channels:], FIRST_LOGVAR)

    def loss(step: int, progress: float) -> Tensor:
        cropped = progress < CROP_SHARE
        pixels = _batch(dataset, np.random.default_rng((seed, step)), cropped)
        return reconstruction_loss(vae, pixels.to(memory_format=torch.channels_last))

    optimisation = Optimisation(learning_rate=2e-3, weight_decay=0.0, ema_decay=0.995)
    fit(vae, loss, optimisation, budget, checkpoint=checkpoint, batch_size=BATCH, seed=seed)
    whiten(vae, as_pixels(dataset.images[:512]))
    return vae


def _batch(dataset: Dataset, rng: np.random.Generator, cropped: bool) -> Tensor:
    if not cropped:
        return as_pixels(dataset.images[rng.integers(len(dataset), size=BATCH)])
    corners = rng.integers(IMAGE_SIZE - CROP + 1, size=(2 * BATCH, 2))
    indices = rng.integers(len(dataset), size=2 * BATCH)
    crops = [dataset.images[i, y : y + CROP, x : x + CROP] for i, (y, x) in zip(indices, corners, strict=True)]
    return as_pixels(np.stack(crops))


def reconstruction_loss(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """The error of images decoded from noisy latents, with a small KL term."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pixels).latent_dist
        latents = posterior.sample()
        spread = latents.detach().std(dim=(0, 2, 3), keepdim=True)
        decoded: Tensor = vae.decode(with_noise(latents, ENCODER_NOISE * spread)).sample.float()
    kl: Tensor = posterior.kl().float().mean() / posterior.mean[0].numel()
    return pixel_loss(decoded, pixels) + mse_loss(decoded, pixels) + KL_WEIGHT * kl


def with_noise(latents: Tensor, most: Tensor | float) -> Tensor:
    """(n, c, h, w) latents with noise, its deviation drawn from 0 to `most` for each image."""
    share = torch.rand(len(latents), 1, 1, 1)
    return latents + most * share * torch.randn_like(latents)


def pixel_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """The L1 error of pixels and of their differences.

    The median of what an uncertain latent may mean has hard edges. The mean has soft ones: a squared error helps only
    where colours are learnt first.
    """
    edges = l1_loss(decoded.diff(dim=2), pixels.diff(dim=2)) + l1_loss(decoded.diff(dim=3), pixels.diff(dim=3))
    return l1_loss(decoded, pixels) + EDGE_WEIGHT * edges


@torch.no_grad()
def whiten(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Fold each latent channel's mean and spread into the convolutions on its two sides.

    Afterwards `scaling_factor` times the latents of `pixels` has zero mean and unit variance, and
    the decoder's output is what it was.
    """
    means = torch.cat([vae.encode(part).latent_dist.mean for part in torch.split(pixels, 32)])
    mean = means.mean(dim=(0, 2, 3))
    spread = means.std(dim=(0, 2, 3)) * SCALING_FACTOR
    channels = len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= spread[None, :, None, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) / spread
    encode.weight[:channels] /= spread[:, None, None, None]
    encode.bias[channels:] -= 2 * spread.log()


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """The scaled mean latents of images, (n, 4, 16, 16) with unit variance."""
    parts = []
    for start in range(0, len(images), 32):
        with torch.autocast("cpu", torch.bfloat16):
            pixels = as_pixels(images[start : start + 32]).to(memory_format=torch.channels_last)
            parts.append(vae.encode(pixels).latent_dist.mean.float() * SCALING_FACTOR)
    return torch.cat(parts)


def train_decoder(
    vae: AutoencoderKL, dataset: Dataset, latents: Tensor, budget: Budget, checkpoint: Path, seed: int = 0
) -> AutoencoderKL:
    """Train the decoder alone for longer: the latents, and with them a trained UNet, stay valid.

    Args:
        latents: scaled latents of `dataset`, to which noise is added.
    """
    vae.requires_grad_(False)
    for part in (vae.post_quant_conv, vae.decoder):
        part.requires_grad_(True)

    def loss(step: int, progress: float) -> Tensor:
        indices = np.random.default_rng((seed, 1, step)).integers(len(dataset), size=BATCH)
        pixels = as_pixels(dataset.images[indices])
        noisy = with_noise(latents[torch.from_numpy(indices)], DECODER_NOISE)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode((noisy / SCALING_FACTOR).to(memory_format=torch.channels_last)).sample.float()
        return pixel_loss(decoded, pixels)

    optimisation = Optimisation(learning_rate=1e-3, weight_decay=0.0, ema_decay=0.995)
    fit(vae, loss, optimisation, budget, checkpoint=checkpoint, batch_size=BATCH, seed=seed)
    return vae
