"""`ipa-bench quality`."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ipa.engines.errors import IpaError

if TYPE_CHECKING:
    from ipa.benchmarks.intervals import Interval
    from ipa.benchmarks.records import Quality, QualityRecord

DEMO = "demo"
PLACE = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)


def _scales(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[float, ...]:
    """Finite numbers with commas between them."""
    try:
        scales = tuple(float(part) for part in text.split(",")) if text is not None else ()
    except ValueError:
        scales = (math.nan,)
    if not all(map(math.isfinite, scales)):
        raise click.BadParameter(f"{text!r} is no list of numbers such as 0,0.5,1", ctx, param)
    return scales


@click.command()
@click.option("--output", required=True, type=PLACE, help="Folder for quality.json, pictures and contact sheets.")
@click.option("--bundle", type=PLACE, help="What to measure.  [default: the demo]")
@click.option(
    "--base",
    help="The same model for PyTorch: a pipeline folder of diffusers, or the Hub id that ipa-export fetched.  "
    "[default: of the demo, the demo's]",
)
@click.option("--adapter", type=PLACE, help="The same IP-Adapter for PyTorch, .safetensors or .bin; goes with --base.")
@click.option(
    "--image-encoder",
    help="The adapter's image encoder for PyTorch, as for ipa-export.  [default: the pipeline's own]",
)
@click.option(
    "--data", help="COCO's folder, .json, .jsonl or .csv as for ipa-train, or demo.  [default: without --bundle, demo]"
)
@click.option("--image-root", type=PLACE, help="That paths in a data file count from.  [default: the file's folder]")
@click.option("--clip", help="Folder of a CLIP model of transformers, or demo.  [default: without --bundle, demo]")
@click.option("--dino", type=PLACE, help="Folder of a DINO or DINOv2 model of transformers.")
@click.option("--inception", type=PLACE, help="torch-fidelity's Inception weights, for FID.")
@click.option("--lpips", type=PLACE, help="AlexNet's weights as torchvision has them, for LPIPS of ours and PyTorch's.")
@click.option("--samples", type=COUNT, default=4, show_default=True, help="Pictures of each image prompt.")
@click.option("--limit", type=COUNT, help="Take the first so many image prompts.  [default: all]")
@click.option("--image-only", is_flag=True, help="Draw without the texts, as the paper's table; `base` keeps them.")
@click.option("--steps", type=COUNT, help="[default: the bundle's]")
@click.option("--guidance-scale", type=float, help="[default: the bundle's]")
@click.option("--scheduler", help="[default: the bundle's]")
@click.option("--ip-adapter-scale", type=float, help="[default: the bundle's]")
@click.option("--height", type=int, help="[default: the bundle's]")
@click.option("--width", type=int, help="[default: the bundle's]")
@click.option("--engine", default="auto", show_default=True, help="auto, or one of those that `ipa-doctor` lists.")
@click.option("--sweep", callback=_scales, help="Also draw the first image prompts at these scales: 0,0.5,1.")
@click.option("--force", is_flag=True, help="Draw all anew, where OUTPUT has pictures of other settings.")
def quality(
    output: Path,
    bundle: Path | None,
    base: str | None,
    adapter: Path | None,
    image_encoder: str | None,
    data: str | None,
    image_root: Path | None,
    clip: str | None,
    dino: Path | None,
    inception: Path | None,
    lpips: Path | None,
    samples: int,
    limit: int | None,
    image_only: bool,
    steps: int | None,
    guidance_scale: float | None,
    scheduler: str | None,
    ip_adapter_scale: float | None,
    height: int | None,
    width: int | None,
    engine: str,
    sweep: tuple[float, ...],
    force: bool,
) -> None:
    """Compare our pictures with PyTorch's of the same seeds and with those of the base model alone.

    An interrupted run goes on: give the same command again. Without --bundle it measures the demo.
    """
    if bundle is not None and (data is None or clip is None):
        raise IpaError(f"--bundle {bundle} needs --data and --clip: what to draw, and a CLIP model that looks at it")
    # Threads that wait by spinning take the cores from whatever else runs there, such as the other library's threads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from ipa.export.quiet import quiet_libraries

    quiet_libraries()
    from ipa.benchmarks.quality_arms import Settings
    from ipa.benchmarks.quality_run import RECORD_FILE, Options, run_quality

    settings = Settings(
        samples, steps, guidance_scale, scheduler, ip_adapter_scale, height, width, is_image_only=image_only
    )
    options = Options(
        output=output,
        data=data or DEMO,
        clip=clip or DEMO,
        bundle=bundle,
        base=base,
        adapter=adapter,
        image_encoder=image_encoder,
        image_root=image_root,
        dino=dino,
        inception=inception,
        lpips=lpips,
        limit=limit,
        engine=engine,
        settings=settings,
        sweep=sweep,
        is_forced=force,
    )
    again = "the same command without --force goes on" if force else "the same command goes on"
    try:
        record = run_quality(options, lambda text: click.echo(f"ipa-bench: {text}", err=True))
    except KeyboardInterrupt:
        click.echo(f"ipa-bench: stopped; {again} from here", err=True)
        sys.exit(130)
    except OSError as error:  # a full disk, an OUTPUT that is a file
        raise IpaError(f"{error.filename or output}: {error.strerror or error}; {again}") from error
    click.echo(table(record))
    click.echo(output / RECORD_FILE)


def table(record: QualityRecord) -> str:
    """A record for people."""
    from ipa.benchmarks.report_numbers import signed

    lines = [f"{record.setting['images']} image prompts x {record.setting['samples']} samples, 95 % intervals"]
    for arm in record.arms:
        lines += ["", f"{arm.name}: {arm.title}", *_figures(arm)]
    for one in record.differences:
        lines += ["", f"{one.first} and {one.second}, pictures of the same seeds: {one.equal.value:.1%} are equal"]
        if one.psnr and one.lowest_psnr is not None:
            lines.append(f"  PSNR of the others, median  {_text(one.psnr, 1)} dB, lowest {one.lowest_psnr:.1f} dB")
        lines += [f"  LPIPS   {_text(one.lpips, 4)}"] if one.lpips else []
    lines += [""] if record.gaps else []
    for gap in record.gaps:
        title = gap.measure.replace("_", "-").upper()
        lines.append(f"{title} of {gap.first} minus {gap.second}, of the same seeds: {signed(gap.value)}")
    if resize := record.setting.get("fid_resize"):
        counts = record.setting["fid_pictures"]
        lines += ["", f"FID: {counts['drawn']} pictures against {counts['data']}; {resize}"]
    if record.sweep:
        sweep = record.sweep
        lines += ["", f"scale sweep, the first {sweep.images} image prompts, pictures of each: {sweep.samples}"]
        for number, scale in enumerate(sweep.scales):
            clip_t = f"  CLIP-T {_text(sweep.clip_t[number])}" if sweep.clip_t else ""
            lines.append(f"  {scale:<5g}  CLIP-I {_text(sweep.clip_i[number])}{clip_t}")
    if record.not_measured:
        lines += ["", *(f"not measured: {one.name}: {one.reason}" for one in record.not_measured)]
    return "\n".join(lines)


def _figures(arm: Quality) -> list[str]:
    lines = [f"  CLIP-I  {_text(arm.clip_i)}"]
    if arm.clip_t:
        value = arm.clip_t.value
        scaled = f"x 2.5 as in the paper {2.5 * value:.3f}, x 100 as torchmetrics {100 * value:.2f}"
        lines.append(f"  CLIP-T  {_text(arm.clip_t)}  ({scaled})")
    lines += [f"  DINO    {_text(arm.dino)}"] if arm.dino else []
    lines += [f"  FID     {_text(arm.fid, 1)}"] if arm.fid else []
    lines += [f"  {name} as asked for  {_text(rate)}" for name, rate in arm.rates.items()]
    return lines


def _text(figure: Interval, digits: int = 3) -> str:
    return f"{figure.value:.{digits}f} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"
