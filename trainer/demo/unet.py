"""Stage 3: the UNet, on latents and text states that were computed once."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from ipa.trainer.demo.clip import CLASSES, NAMED, CaptionTable
from ipa.trainer.demo.loop import Budget, Optimisation, fit
from ipa.trainer.demo.models import build_scheduler, build_unet, signal_to_noise
from ipa.trainer.demo.tokenizer import MAX_LENGTH

BATCH = 48  # over all workers
CAPTION_DROP = 0.1
SNR_CAP = 5.0  # min-SNR weighting: arXiv:2303.09556, section 3.4
SNR_FLOOR = 0.2  # added to it: the noisiest timesteps decide the colours, and would be learnt last
OPTIMISATION = Optimisation(learning_rate=1e-3, warmup_steps=150, ema_decay=0.999)


@dataclass(frozen=True)
class UNetData:
    """What the UNet trains on.

    Attributes:
        latents: (images, 4, 16, 16) scaled latents.
        attributes: (images, 4) what they show.
        text_states: (captions + 1, 77, 128) text encoder states of every caption; the last is the empty one's.
        strides: what turns named attributes into a caption's row.
    """

    latents: Tensor
    attributes: Tensor
    text_states: Tensor
    strides: Tensor


def load_unet_data(path: Path) -> UNetData:
    """Read what was written as `torch.save(vars(data), path)`, memory-mapped."""
    return UNetData(**torch.load(path, weights_only=True, mmap=True))


@torch.no_grad()
def embed_captions(text_encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer) -> tuple[Tensor, Tensor]:
    """The states of every caption and of the empty one, and the strides that number them."""
    table = CaptionTable(tokenizer)
    tokens = tokenizer([*table.texts, ""], padding="max_length", max_length=MAX_LENGTH, return_tensors="pt")
    parts = [text_encoder(ids).last_hidden_state for ids in tokens["input_ids"].split(64)]
    return torch.cat(parts), table.strides


def train_unet(data: Path, budget: Budget, checkpoint: Path, workers: int = 1, seed: int = 0) -> UNet2DConditionModel:
    """Train the UNet in `workers` processes of one thread each and return it with averaged weights.

    Args:
        data: a file of `UNetData`'s fields, written by `torch.save`.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, args=(workers, f"file://{folder}/meet", data, budget, checkpoint, seed), nprocs=workers)  # type: ignore[no-untyped-call]
    unet = build_unet()
    unet.load_state_dict(torch.load(_averaged(checkpoint), weights_only=True))
    return unet.eval()


def _averaged(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}-averaged.pt")


def _work(rank: int, world: int, meeting: str, data: Path, budget: Budget, checkpoint: Path, seed: int) -> None:
    """One worker: its share of each batch, gradients averaged by `fit`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    loaded = load_unet_data(data)
    torch.manual_seed(seed)
    unet = build_unet()
    alphas = build_scheduler().alphas_cumprod
    weights = (signal_to_noise().clamp(max=SNR_CAP) + SNR_FLOOR) / signal_to_noise()

    def loss(step: int, progress: float) -> Tensor:
        return denoising_loss(unet, loaded, BATCH // world, alphas, weights)

    fit(unet, loss, OPTIMISATION, budget, checkpoint=checkpoint, batch_size=BATCH, seed=seed)
    if rank == 0:
        torch.save(unet.state_dict(), _averaged(checkpoint))
    dist.barrier()
    dist.destroy_process_group()


def denoising_loss(unet: UNet2DConditionModel, data: UNetData, batch: int, alphas: Tensor, weights: Tensor) -> Tensor:
    """The weighted squared error of the predicted noise on a random batch."""
    indices = torch.randint(len(data.latents), (batch,))
    latents = data.latents[indices]
    named = data.attributes[indices]
    hidden = torch.rand(batch, 3) >= torch.tensor(NAMED)
    named[:, 1:] = torch.where(hidden, torch.tensor(CLASSES[1:]), named[:, 1:])
    rows = (named * data.strides).sum(dim=-1)
    rows = torch.where(torch.rand(batch) < CAPTION_DROP, len(data.text_states) - 1, rows)
    # One timestep from each of `batch` equal spans: the same spread as independent draws with less noise.
    timesteps = ((torch.arange(batch) + torch.rand(batch)) * (len(alphas) / batch)).long().clamp(max=len(alphas) - 1)
    noise = torch.randn_like(latents)
    alpha = alphas[timesteps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    predicted: Tensor = unet(noisy, timesteps, data.text_states[rows]).sample
    return (weights[timesteps] * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()
