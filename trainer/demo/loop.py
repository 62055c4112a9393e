"""The training loop that every stage shares: cosine schedule, weight average, checkpoints, a rate on stderr."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ipa.trainer.files import atomic_path

SECONDS_BETWEEN_CHECKPOINTS = 60.0


@dataclass(frozen=True)
class Budget:
    """How long a stage trains: so many steps, or fewer if the minutes run out first.

    The learning rate follows whichever is further along, so a stage always ends with its schedule
    done. With `minutes` left out a run is reproducible step for step.
    """

    steps: int
    minutes: float | None = None

    def progress(self, step: int, seconds: float) -> float:
        """The share of the budget that is spent, 0 to 1."""
        share = step / self.steps
        if self.minutes is not None:
            share = max(share, seconds / (60 * self.minutes))
        return min(share, 1.0)


@dataclass(frozen=True)
class Optimisation:
    """AdamW with a linear warm-up and a cosine decay to zero."""

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup_steps: int = 100
    clip_norm: float = 1.0
    ema_decay: float | None = None

    def rate(self, step: int, progress: float) -> float:
        """The learning rate of a step."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * progress))


Loss = Callable[[int, float], Tensor]
"""The loss of a step, given its number and the share of the budget that is spent."""


def fit(
    model: nn.Module,
    loss: Loss,
    optimisation: Optimisation,
    budget: Budget,
    *,
    checkpoint: Path,
    batch_size: int,
    seed: int = 0,
) -> nn.Module:
    """Train `model` in place, or go on from `checkpoint`, and return it with its averaged weights.

    Each step seeds torch's generator with the stage's seed, its number and its rank: a resumed run
    sees the batches that an unbroken one would have seen. Inside an initialised process group the
    gradients are averaged over the ranks; rank 0 writes the checkpoints.

    Args:
        batch_size: images a step, over all ranks; used for the rate shown alone.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1]
    kept = [p for p in parameters if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=0.0, betas=optimisation.betas, weight_decay=optimisation.weight_decay, fused=True
    )
    average = [p.detach().clone() for p in parameters]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    step, spent = _resume(checkpoint, model, optimizer, average)
    start = time.monotonic() - spent
    saved = time.monotonic()
    running = math.nan
    bar = tqdm(
        initial=step * batch_size, total=budget.steps * batch_size, desc=checkpoint.stem, unit="image", disable=rank > 0
    )
    model.train()
    while True:
        progress = _agreed(budget.progress(step, time.monotonic() - start))
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = optimisation.rate(step, progress)
        torch.manual_seed((seed * 1_000_003 + step) * world + rank)
        value = loss(step, progress)
        value.backward()  # type: ignore[no-untyped-call]
        if world > 1:
            _average_gradients(parameters, world)
        nn.utils.clip_grad_norm_(parameters, optimisation.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(optimisation.ema_decay or 0.0, step / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        running = value.item() if math.isnan(running) else running + 0.02 * (value.item() - running)
        bar.update(batch_size)
        bar.set_postfix(loss=f"{running:.4f}", done=f"{progress:.1%}", refresh=False)
        if rank == 0 and time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
            _save(checkpoint, model, optimizer, average, step, time.monotonic() - start)
            saved = time.monotonic()
    if rank == 0:
        _save(checkpoint, model, optimizer, average, step, time.monotonic() - start)
    bar.close()
    _load_average(parameters, average)
    return model.eval()


def load_averaged(model: nn.Module, checkpoint: Path) -> nn.Module:
    """Put a checkpoint's averaged weights into `model`, to look at a stage that is still training."""
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    _load_average([p for p in model.parameters() if p.requires_grad], state["average"])
    return model.eval()


def _agreed(progress: float) -> float:
    """The largest progress of all ranks, so that they stop at the same step."""
    if not dist.is_initialized():
        return progress
    shared = torch.tensor([progress], dtype=torch.float64)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return float(shared)


def _average_gradients(parameters: list[nn.Parameter], world: int) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, torch.split(flat / world, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _load_average(parameters: list[nn.Parameter], average: list[Tensor]) -> None:
    for parameter, mean in zip(parameters, average, strict=True):
        parameter.data.copy_(mean)


def _save(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: list[Tensor],
    step: int,
    seconds: float,
) -> None:
    state: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average,
        "step": step,
        "seconds": seconds,
    }
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(checkpoint) as temporary:
        torch.save(state, temporary)


def _resume(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: list[Tensor]
) -> tuple[int, float]:
    """Load a checkpoint if there is one; the steps taken and the seconds spent so far."""
    if not checkpoint.exists():
        return 0, 0.0
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for mean, saved in zip(average, state["average"], strict=True):
        mean.copy_(saved)
    return state["step"], state["seconds"]
