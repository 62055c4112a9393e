"""The options that change a base model, the same for every command that reads one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ipa.export.changes import BaseChanges

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--config",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Configurations and tokenizer of a checkpoint file, as a pipeline folder has them; default: "
        "those of Stable Diffusion 1.5 or XL 1.0.",
    ),
    click.option("--vae", metavar="DIR_OR_ID_OR_FILE", help="VAE to use in place of the base model's."),
    click.option(
        "--lora",
        "loras",
        multiple=True,
        metavar="FILE[=SCALE]",
        help="LoRA to add into the weights, with this weight (default: 1); may be repeated.",
    ),
    click.option(
        "--textual-inversion",
        "textual_inversions",
        multiple=True,
        metavar="FILE[=WORD]",
        help="Embedding of a new word (default: the file's own); for XL with clip_l and clip_g; may be repeated.",
    ),
)
_CLIP_SKIP = click.option(
    "--clip-skip",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Layers of the text encoders to leave out, for prompt and negative prompt: diffusers' clip_skip, "
    "in 1.x AUTOMATIC1111's 'Clip skip' less 1.",
)


def base_files(command: Command) -> Command:
    """Add the options that name files; the command takes them as keywords for `parse_changes`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def base_changes(command: Command) -> Command:
    """Add all of them, `--clip-skip` too."""
    return base_files(_CLIP_SKIP(command))


def parse_changes(
    config: Path | None,
    vae: str | None,
    loras: tuple[str, ...],
    textual_inversions: tuple[str, ...],
    clip_skip: int = 0,
) -> BaseChanges:
    """What the options say.

    Raises:
        IpaError: a scale is no number.
    """
    from ipa.export.changes import BaseChanges, parse_lora, parse_textual_inversion

    return BaseChanges(
        config, vae, tuple(map(parse_lora, loras)), tuple(map(parse_textual_inversion, textual_inversions)), clip_skip
    )
