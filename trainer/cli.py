"""``ipa-train``: train an adapter, or the demo model from scratch.

Arguments are parsed before torch is imported, so that help and mistakes come at once.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import click

from ipa.trainer.errors import TrainError, missing_library
from ipa.trainer.interrupt import TrainStoppedError
from ipa.trainer.options import AdapterOptions

FILE = click.Path(path_type=Path)


@click.group()
def cli() -> None:
    """Train image prompts (IP-Adapter) for Stable Diffusion."""


@cli.command()
@click.option("--base", required=True, help="Stable Diffusion 1.x/2.x pipeline in diffusers format: folder or hub id.")
@click.option("--image-encoder", required=True, help="CLIP vision model with projection: folder or hub id.")
@click.option("--data", required=True, type=FILE, help="Records: .json, .jsonl or .csv.")
@click.option("--image-root", required=True, type=FILE, help="Folder that the records' paths are relative to.")
@click.option("--output", required=True, type=FILE, help="Folder for the adapter, the log and the checkpoints.")
@click.option("--steps", required=True, type=int, help="Optimizer steps in all.")
@click.option("--num-tokens", type=int, help="Image tokens. diffusers loads exactly 4.")
@click.option("--learning-rate", type=float)
@click.option("--weight-decay", type=float)
@click.option("--batch-size", type=int, help="Samples per process and micro step.")
@click.option("--gradient-accumulation-steps", type=int, help="Micro steps per optimizer step.")
@click.option("--resolution", type=int, help="Side of the training images in pixels. [default: the base model's own]")
@click.option("--drop-image", type=float, help="Probability that only the image is dropped.")
@click.option("--drop-text", type=float, help="Probability that only the text is dropped.")
@click.option("--drop-both", type=float, help="Probability that both are dropped.")
@click.option("--timestep-bias", type=float, help="0 is uniform; above, noisier timesteps come more often (t ** bias).")
@click.option("--mixed-precision", help="no, fp16 or bf16.")
@click.option("--lr-scheduler", help="constant or cosine.")
@click.option("--lr-warmup-steps", type=int)
@click.option("--max-grad-norm", type=float, help="Clip gradients to this norm. [default: off]")
@click.option("--ema-decay", type=float, help="Write a moving average of the weights, e.g. 0.999. [default: off]")
@click.option("--init-adapter", type=FILE, help="Adapter file to start from. [default: copies of the text weights]")
@click.option("--cache-latents", is_flag=True, help="Encode everything once, before the first step, into memory.")
@click.option("--num-workers", type=int, help="Processes that read images ahead.")
@click.option("--seed", type=int)
@click.option("--checkpoint-every", type=int, help="Optimizer steps between checkpoints.")
@click.option("--keep-checkpoints", type=int, help="Newest checkpoints to keep, at least 2.")
@click.option("--resume/--no-resume", default=True, help="Go on from the newest checkpoint in --output. [default: yes]")
@click.option("--log-every", type=int, help="Optimizer steps per line of train_log.jsonl.")
def adapter(**given: Any) -> None:
    """Train a base-kind IP-Adapter; writes ip_adapter.safetensors and ip_adapter.bin.

    Several processes: `torchrun --nproc_per_node 2 -m ipa.trainer.cli adapter ...`, on GPUs or CPU cores.
    """
    options = AdapterOptions(**{name: value for name, value in given.items() if value is not None})
    from ipa.trainer.adapter import train_adapter

    result = train_adapter(options)
    if int(os.environ.get("RANK", "0")) == 0:  # set by torchrun
        click.echo(f"{result.safetensors}\n{result.bin}")


COUNT = click.IntRange(min=1)


@cli.command()
@click.option("--output", required=True, type=FILE, help="Folder for the pipeline, the adapter and the judge.")
@click.option("--stage", "stages", multiple=True, help="Only this stage; may be repeated. [default: all]")
@click.option("--images", type=COUNT, help="Training images to draw.")
@click.option("--judge-images", type=COUNT, help="Images to draw for the shape judge.")
@click.option("--adapter-pairs", type=COUNT, help="Pairs of target and reference to draw for the adapter.")
@click.option("--vae-steps", type=COUNT)
@click.option("--clip-steps", type=COUNT)
@click.option("--unet-steps", type=COUNT)
@click.option("--decoder-steps", type=COUNT)
@click.option("--adapter-steps", type=COUNT)
@click.option("--judge-steps", type=COUNT)
@click.option("--evaluation-pairs", type=COUNT, help="Held-out pairs that the last stage judges.")
@click.option("--minutes", type=float, help="Shorten the stages to fit into about this time. [default: full length]")
@click.option("--workers", type=COUNT, help="Processes that draw and train.")
@click.option("--seed", type=click.IntRange(min=0))
def demo(output: Path, stages: tuple[str, ...], **given: Any) -> None:
    """Train the demo model from scratch: draw its data, train every part; hours on two CPU cores.

    A finished stage is kept and an interrupted one goes on: run the same command again.
    """
    if given["minutes"] is not None and not 0 < given["minutes"] < math.inf:
        raise TrainError(f"--minutes is {given['minutes']}, expected a number above 0")
    from ipa.trainer.demo.chain import STAGES, DemoConfig, train

    config = DemoConfig(**{name: value for name, value in given.items() if value is not None})
    folder = train(output, config, stages or STAGES)
    click.echo(f"{folder.pipeline}\n{folder.adapter}\n{folder.judge}")


def _show_defaults(command: click.Command) -> None:
    """Complete the help of options that have their default in ``AdapterOptions``, so that it is stated once."""
    for option in command.params:
        default = AdapterOptions.__dataclass_fields__[option.name or ""].default
        is_plain = isinstance(default, int | float | str) and not isinstance(default, bool)
        if isinstance(option, click.Option) and is_plain:
            option.help = f"{option.help or ''} [default: {default}]".strip()


_show_defaults(adapter)


def main() -> None:
    """Entry point: exit code 2 and one message for what the user can put right, 128 + signal when stopped."""
    # Both are read when the libraries are imported, which the commands do.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Threads that wait by spinning stand in each other's way when other work shares the cores:
    # 0.6 samples a second instead of 12 on 2 busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except TrainError as error:
        _fail(str(error), 2)
    except ModuleNotFoundError as error:
        _fail(missing_library(error, "train"), 2)
    except TrainStoppedError as error:
        _fail(str(error), 128 + error.signum)
    except (KeyboardInterrupt, click.Abort):
        _fail("stopped; run the same command again to go on from where it was saved last", 128 + signal.SIGINT)


def _fail(message: str, code: int) -> None:
    click.echo(f"ipa-train: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
