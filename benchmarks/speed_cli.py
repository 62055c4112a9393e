"""`ipa-bench speed`: options, models and the record; the timing is in `ipa.benchmarks.speed_run`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ipa.benchmarks.contender import TASKS
from ipa.engines.errors import IpaError
from ipa.runtime.schedulers import SCHEDULER_NAMES

_PLACE = click.Path(path_type=Path)
_EXIT_INTERRUPTED = 130  # as ipa-run: 128 + SIGINT


@click.command()
@click.option("--output", type=_PLACE, required=True, help="Folder for the record, and for models that are made.")
@click.option(
    "--model",
    default="demo",
    show_default=True,
    metavar="sd15|sdxl|small|demo|BUNDLE",
    help="Full size or small with random weights, the demo model, or a bundle of yours.",
)
@click.option("--base", metavar="DIR_OR_ID", help="Of a bundle: the pipeline that it was exported from, for PyTorch.")
@click.option("--image-encoder", metavar="DIR_OR_ID", help="Of a bundle: its image encoder, as ipa-export got it.")
@click.option("--adapter", type=_PLACE, help="Of a bundle: its IP-Adapter file, for PyTorch.")
@click.option("--controlnet", metavar="[NAME=]DIR", help="Of a bundle: one of its ControlNets, for PyTorch.")
@click.option("--task", type=click.Choice(TASKS), default="variation", show_default=True)
@click.option(
    "--engine",
    "names",
    metavar="LIST",
    help="Contenders, comma between them; the first is what ratios are to. [default: all]",
)
@click.option("--resolution", metavar="WIDTHxHEIGHT", help="[default: the model's own]")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Pictures a call.")
@click.option("--steps", default=25, show_default=True, type=click.IntRange(1), help="Of a whole picture.")
@click.option(
    "--block-steps",
    type=click.IntRange(1),
    help="Steps timed at one go. [default: 1; all on a GPU, for demo and small]",
)
@click.option("--scheduler", type=click.Choice(SCHEDULER_NAMES), default="ddim", show_default=True)
@click.option("--guidance-scale", default=5.0, show_default=True, help="1: off, half the UNet's batch.")
@click.option("--pairs", default=7, show_default=True, type=click.IntRange(2), help="Rounds A B B A.")
@click.option("--models", "folder", type=_PLACE, help="Folder for models that are made. [default: OUTPUT/models]")
@click.option("--overhead/--no-overhead", default=True, help="Measure what the image prompt costs a step.")
@click.option("--start-up/--no-start-up", default=True, help="Measure imports and installations.")
def speed(
    output: Path,
    model: str,
    names: str | None,
    folder: Path | None,
    base: str | None,
    image_encoder: str | None,
    **given: Any,
) -> None:
    """Time PyTorch and every engine in turn, in one run.

    Writes OUTPUT/speed_MODEL_TASK.json, which `ipa-bench report` makes a page of; what differs from the defaults, such
    as the resolution, is in its name.
    """
    from ipa.export.quiet import quiet_libraries

    quiet_libraries()
    from ipa.benchmarks.bundle_origin import source_folder
    from ipa.benchmarks.speed import measure_speed
    from ipa.benchmarks.speed_options import SpeedOptions

    options = SpeedOptions(
        model=model,
        output=output,
        folder=folder or output / "models",
        base=None if base is None else source_folder("--base", base, "model_index.json"),
        image_encoder=(
            None if image_encoder is None else source_folder("--image-encoder", image_encoder, "config.json")
        ),
        names=None if names is None else tuple(name.strip() for name in names.split(",")),
        **given,
    )
    try:
        measured = measure_speed(options)
    except KeyboardInterrupt:
        click.echo("ipa-bench: interrupted before anything was measured", err=True)
        sys.exit(_EXIT_INTERRUPTED)
    except OSError as error:  # a full disk, say
        raise IpaError(f"{error.filename or output}: {error.strerror or error}") from error
    record = measured.record
    for row in record.contenders:
        against = "" if row.ratio is None else f"{row.ratio.value:.2f} ({row.ratio.low:.2f} to {row.ratio.high:.2f})"
        click.echo(f"{row.name:20} {1 / row.step_seconds.value:9.3g} step/s  {against}")
    if record.null is not None:
        click.echo(f"{'the null':20} {record.null.value:.3f} ({record.null.low:.3f} to {record.null.high:.3f})")
    for cost in record.overhead:
        ratio = cost.ratio
        click.echo(
            f"{cost.name} on {cost.contender}: {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) x without"
        )
    for missing in record.not_measured:
        click.echo(f"not measured: {missing.name}: {missing.reason}")
    click.echo(measured.file)
    if measured.is_interrupted:
        click.echo("ipa-bench: interrupted; the record has what was measured until then", err=True)
        sys.exit(_EXIT_INTERRUPTED)
