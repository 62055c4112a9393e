"""What one adapter training run is: every choice that the user can make, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ipa.trainer.errors import TrainError

MixedPrecision = Literal["no", "fp16", "bf16"]
LrScheduler = Literal["constant", "cosine"]
MAX_SEED = 2**64 - 1  # what torch's generator takes


@dataclass(frozen=True)
class AdapterOptions:
    """Options of ``ipa-train adapter``; the defaults are the official recipe.

    Attributes:
        base: Stable Diffusion 1.x/2.x pipeline in diffusers format, a folder or a hub id.
        image_encoder: CLIP vision model with projection (transformers format), a folder or a hub id.
        data: records as JSON, JSONL or CSV, see ``ipa.trainer.data``.
        image_root: folder that the records' paths are relative to.
        output: folder for the adapter, the log and the checkpoints.
        steps: optimizer steps in all (not counted anew on resume).
        num_tokens: image tokens; diffusers loads base-kind adapters with exactly 4.
        batch_size: samples per process and micro step.
        resolution: side of the square training images in pixels; None is the UNet's own size.
        drop_image, drop_text, drop_both: exclusive probabilities of a dropped condition.
        timestep_bias: 0 draws timesteps uniformly; density is proportional to timestep ** timestep_bias.
        max_grad_norm: gradient clipping; None is off.
        ema_decay: average the weights with this decay and write the average; None is off.
        init_adapter: adapter file to start from instead of copies of the text weights.
        cache_latents: encode every image and caption once, before the first step, and keep them in memory.
        checkpoint_every: optimizer steps between checkpoints.
        log_every: optimizer steps that one line of ``train_log.jsonl`` averages over.
    Raises:
        TrainError: a value is out of range.
    """

    base: str
    image_encoder: str
    data: Path
    image_root: Path
    output: Path
    steps: int
    num_tokens: int = 4
    learning_rate: float = 1e-4
    weight_decay: float = 1e-2
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    resolution: int | None = None
    drop_image: float = 0.05
    drop_text: float = 0.05
    drop_both: float = 0.05
    timestep_bias: float = 0.0
    mixed_precision: MixedPrecision = "no"
    lr_scheduler: LrScheduler = "constant"
    lr_warmup_steps: int = 0
    max_grad_norm: float | None = None
    ema_decay: float | None = None
    init_adapter: Path | None = None
    cache_latents: bool = False
    num_workers: int = 0
    seed: int = 0
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    resume: bool = True
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "num_tokens", "batch_size", "gradient_accumulation_steps", "checkpoint_every"):
            _at_least(self, name, 1)
        _at_least(self, "log_every", 1)
        _at_least(self, "keep_checkpoints", 2)
        for name in ("num_workers", "lr_warmup_steps"):
            _at_least(self, name, 0)
        for name in ("learning_rate", "weight_decay", "timestep_bias"):
            _finite(self, name)
        if self.learning_rate == 0:
            raise TrainError("--learning-rate is 0, expected a number above 0")
        if self.resolution is not None and self.resolution < 16:
            raise TrainError(f"--resolution is {self.resolution}, expected at least 16 pixels")
        if not 0 <= self.seed <= MAX_SEED:
            raise TrainError(f"--seed is {self.seed}, expected 0 to 2**64 - 1")
        drops = (self.drop_image, self.drop_text, self.drop_both)
        # "not >=" also catches NaN
        if any(not drop >= 0 for drop in drops) or not sum(drops) <= 1:
            raise TrainError(
                f"--drop-image, --drop-text and --drop-both are {drops}, "
                "expected probabilities of at least 0 that sum to at most 1"
            )
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm < math.inf:
            raise TrainError(f"--max-grad-norm is {self.max_grad_norm}, expected a number above 0")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise TrainError(f"--ema-decay is {self.ema_decay}, expected a number between 0 and 1, such as 0.999")
        for name, choices in (("mixed_precision", MixedPrecision), ("lr_scheduler", LrScheduler)):
            if getattr(self, name) not in get_args(choices):
                expected = ", ".join(get_args(choices))
                raise TrainError(f"{_flag(name)} is {getattr(self, name)!r}, expected one of {expected}")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the optimizer step with this number, counted from 0.

        Linear warm-up, then constant, or half a cosine down to 0 at the last step.
        """
        if step < self.lr_warmup_steps:
            return self.learning_rate * (step + 1) / self.lr_warmup_steps
        if self.lr_scheduler == "constant":
            return self.learning_rate
        progress = (step - self.lr_warmup_steps) / max(1, self.steps - self.lr_warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _at_least(options: AdapterOptions, name: str, smallest: int) -> None:
    value = getattr(options, name)
    if value < smallest:
        raise TrainError(f"{_flag(name)} is {value}, expected at least {smallest}")


def _finite(options: AdapterOptions, name: str) -> None:
    value = getattr(options, name)
    if not 0 <= value < math.inf:
        raise TrainError(f"{_flag(name)} is {value}, expected a finite number of at least 0")
