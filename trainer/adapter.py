"""Training of a base-kind IP-Adapter: the official recipe, written as one flat loop.

Source: arXiv:2308.06721, section 3.2; the official training script for the drops and the optimizer.
"""

from __future__ import annotations

import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from ipa.trainer.base import LATENT_CHANNELS, BaseModel, load_base
from ipa.trainer.broken import BrokenImages
from ipa.trainer.data import read_records
from ipa.trainer.draws import Draws, Sampler
from ipa.trainer.ema import MovingAverage
from ipa.trainer.errors import TrainError
from ipa.trainer.examples import CachedExamples, EncodedBatch, ExampleReader, Examples, LiveExamples
from ipa.trainer.files import atomic_path
from ipa.trainer.interrupt import StopRequest, TrainStoppedError, noted_signals
from ipa.trainer.model import AdapterModel
from ipa.trainer.options import AdapterOptions
from ipa.trainer.progress import Progress, TrainLog
from ipa.trainer.state import TrainState, run_identity
from ipa.trainer.weights import cpu_copies, load_adapter, save_adapter

ENCODER_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DIFFUSERS_TOKENS = 4
SUMMARY_LINES = 10  # log lines that the first and last loss of training.json average over


@dataclass(frozen=True)
class TrainResult:
    """What a finished run has written.

    Attributes:
        safetensors, bin: the adapter, in both official layouts.
        summary: ``training.json``.
        final_loss: mean of the last log lines.
        skipped: records left out for broken images.
    """

    safetensors: Path
    bin: Path
    summary: Path
    final_loss: float
    skipped: int


def train_adapter(options: AdapterOptions) -> TrainResult:
    """Train an adapter, or go on with a training that was stopped.

    Called in every process of ``torchrun`` or ``accelerate launch``; the main one writes.

    Raises:
        TrainError: options, data, models or the disk do not allow it.
        TrainStoppedError: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    accelerator = _make_accelerator(options)
    try:
        with Progress(accelerator.is_main_process) as progress:
            return _train(options, accelerator, progress)
    finally:
        # These are process-wide: left alone, they would bind the next training to this one's precision.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def _train(options: AdapterOptions, accelerator: Any, progress: Progress) -> TrainResult:
    _make_output(options.output)
    records = read_records(options.data, options.image_root)
    if options.num_tokens != DIFFUSERS_TOKENS:
        progress.main_message(
            f"note: diffusers loads base-kind adapters with exactly {DIFFUSERS_TOKENS} tokens; "
            f"this one will have {options.num_tokens} and works with ipa-export and ipa-run only"
        )
    base = load_base(options.base, options.image_encoder)
    resolution = options.resolution or int(base.unet.config.sample_size) * base.vae_scale_factor
    _check_resolution(resolution, base)
    base.freeze(accelerator.device, ENCODER_DTYPES[options.mixed_precision])

    torch.manual_seed(options.seed)  # the projection's initial weights
    model = AdapterModel(base.unet, base.image_embed_dim, options.num_tokens).to(accelerator.device)
    if options.init_adapter is not None:
        model.load_adapter_state_dict(load_adapter(options.init_adapter), str(options.init_adapter))
    optimizer = torch.optim.AdamW(
        model.adapter_parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
    )
    prepared, optimizer = accelerator.prepare(model, optimizer)
    average = None if options.ema_decay is None else MovingAverage(model.named_weights(), options.ema_decay)

    identity = {**run_identity(options, records, accelerator.num_processes), "resolution": resolution}
    state = TrainState(accelerator, model, optimizer, average, identity, options.output / "checkpoints")
    if options.resume:
        state.resume(progress.main_message)
    else:
        state.start_afresh(progress.main_message)

    broken = BrokenImages(len(records), progress.message)
    reader = ExampleReader(records, resolution, base.image_processor)
    examples: Examples
    if options.cache_latents:
        examples = CachedExamples(
            base, reader, broken, accelerator, lambda done, total: progress.update("encoding", done, total)
        )
    else:
        examples = LiveExamples(base, reader, broken, options.num_workers)

    sampler = _make_sampler(options, accelerator, base, resolution)
    log = TrainLog(options.output / "train_log.jsonl", state.step) if accelerator.is_main_process else None
    started = time.monotonic()
    with noted_signals() as stop:
        _run_steps(options, state, prepared, base, examples, sampler, progress, log, stop)

    skipped = int(accelerator.reduce(torch.tensor(broken.count, device=accelerator.device), "sum").item())
    weights = cpu_copies(state.weights())
    paths = options.output / "ip_adapter.safetensors", options.output / "ip_adapter.bin"
    summary = options.output / "training.json"
    losses = log.losses() if log is not None else []
    final_loss = _mean(losses[-SUMMARY_LINES:])
    if accelerator.is_main_process:
        save_adapter(weights, options.output)
        figures = {
            "steps": state.step,
            "records": len(records),
            "records_skipped": skipped,
            "first_loss": _mean(losses[:SUMMARY_LINES]),
            "final_loss": final_loss,
            "seconds": round(time.monotonic() - started, 1),
            "processes": accelerator.num_processes,
            "resolution": resolution,
            "trained_parameters": sum(weight.numel() for weight in weights.values()),
        }
        _write_summary(summary, options, figures)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return TrainResult(*paths, summary, final_loss, skipped)


def _run_steps(
    options: AdapterOptions,
    state: TrainState,
    prepared: Any,
    base: BaseModel,
    examples: Examples,
    sampler: Sampler,
    progress: Progress,
    log: TrainLog | None,
    stop: StopRequest,
) -> None:
    """The optimizer steps that are left. One step is ``gradient_accumulation_steps`` micro steps."""
    accelerator, optimizer = state.accelerator, state.optimizer
    micro_steps = options.gradient_accumulation_steps
    first, last = state.step * micro_steps, options.steps * micro_steps
    batches = examples.batches(sampler.indices(first, last, examples.size))
    losses: list[Tensor] = []
    for micro_step, batch in zip(range(first, last), batches, strict=True):
        lr = options.learning_rate_at(state.step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with accelerator.accumulate(prepared):
            loss = training_loss(prepared, base, batch, examples, sampler.draws(micro_step))
            accelerator.backward(loss)
            if accelerator.sync_gradients and options.max_grad_norm is not None:
                accelerator.clip_grad_norm_(state.model.adapter_parameters(), options.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        if not accelerator.sync_gradients:
            continue

        state.step += 1
        if state.average is not None:
            state.average.update(state.model.named_weights(), state.step)
        mean_loss, signum = _agree(accelerator, torch.stack(losses).mean(), stop.signum)
        losses = []
        if not math.isfinite(mean_loss):
            raise TrainError(
                f"the loss of step {state.step} is {mean_loss}; the newest checkpoint is of step {state.saved_step}. "
                "Lower --learning-rate, set --max-grad-norm 1, or use --mixed-precision bf16 or no"
            )
        is_last = state.step == options.steps
        if log is not None:
            log.add(mean_loss)
            if state.step % options.log_every == 0 or is_last or signum:
                log.write(state.step, lr)
        progress.update("training", state.step, options.steps, f"loss {mean_loss:.4f}")
        if state.step % options.checkpoint_every == 0 or is_last or signum:
            state.save(options.keep_checkpoints)
        if signum and not is_last:
            raise TrainStoppedError(
                f"stopped after step {state.step} of {options.steps}; the checkpoint is in {state.root}, "
                "run the same command again to go on",
                signum,
            )


def training_loss(prepared: Any, base: BaseModel, batch: EncodedBatch, examples: Examples, draws: Draws) -> Tensor:
    """Mean squared error, in float32, of the UNet's prediction for noised latents.

    The target is the noise, or the velocity where the base model predicts that (arXiv:2202.00512, appendix D).
    A dropped image is a zero embedding, which the projection still turns into tokens; a dropped text is ``""``.

    Args:
        prepared: the ``AdapterModel`` as the accelerator wrapped it.
        base: the frozen models.
        batch: encoded examples.
        examples: where the batch comes from; encodes the captions.
        draws: the micro step's random numbers.
    """
    device = batch.latent_mean.device
    latent_noise, noise = (torch.from_numpy(array).to(device) for array in (draws.latent_noise, draws.noise))
    timesteps = torch.from_numpy(draws.timesteps).to(device)
    latents = (batch.latent_mean + batch.latent_std * latent_noise) * base.vae.config.scaling_factor
    noisy_latents = base.noise_scheduler.add_noise(latents, noise, timesteps)

    captions = ["" if drop else text for text, drop in zip(batch.captions, draws.is_text_dropped, strict=True)]
    keep_image = torch.from_numpy(~draws.is_image_dropped).to(device)
    image_embeds = batch.image_embeds * keep_image[:, None]

    prediction = prepared(noisy_latents, timesteps, examples.text_states(captions), image_embeds)
    is_velocity = base.noise_scheduler.config.prediction_type == "v_prediction"
    target = base.noise_scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
    return F.mse_loss(prediction.float(), target.float())


def _make_accelerator(options: AdapterOptions) -> Any:
    if options.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise TrainError("--mixed-precision fp16 needs a GPU; use bf16 or no here")
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # said aloud, because only then do several CPU processes meet
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
    )


def _make_output(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        with atomic_path(output / ".writable") as partial:
            partial.touch()
        (output / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise TrainError(f"--output {output} cannot be written to: {error.strerror}") from error


def _check_resolution(resolution: int, base: BaseModel) -> None:
    # The latents are halved between the UNet's blocks; a remainder would not fit on the way up.
    multiple = base.vae_scale_factor * 2 ** (len(base.unet.config.block_out_channels) - 1)
    if resolution % multiple != 0:
        raise TrainError(f"--resolution is {resolution}, expected a multiple of {multiple} for this base model")


def _make_sampler(options: AdapterOptions, accelerator: Any, base: BaseModel, resolution: int) -> Sampler:
    side = resolution // base.vae_scale_factor
    return Sampler(
        seed=options.seed,
        batch_size=options.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        drop_image=options.drop_image,
        drop_text=options.drop_text,
        drop_both=options.drop_both,
        timestep_bias=options.timestep_bias,
        num_train_timesteps=base.noise_scheduler.config.num_train_timesteps,
        latent_shape=(LATENT_CHANNELS, side, side),
    )


def _agree(accelerator: Any, loss: Tensor, signum: int) -> tuple[float, int]:
    """Mean loss and signal over all processes, so that they all stop at the same step or not at all."""
    if accelerator.num_processes == 1:
        return loss.item(), signum
    signal_number = torch.tensor(float(signum), device=loss.device)
    figures = accelerator.gather(torch.stack([loss.float(), signal_number])[None])
    return figures[:, 0].mean().item(), int(figures[:, 1].max().item())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _write_summary(path: Path, options: AdapterOptions, figures: dict[str, Any]) -> None:
    libraries = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
    summary = {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        **figures,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
    }
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
