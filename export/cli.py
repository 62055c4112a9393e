"""`ipa-export`: weights to bundles, adapters into bundles, and the proof that they agree."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import click

from ipa.engines.errors import IpaError
from ipa.engines.spec import MAX_SLOTS, ImageSlots
from ipa.export.base_options import base_changes, base_files, parse_changes
from ipa.export.engine_cli import build_engines
from ipa.trainer.errors import missing_library

DTYPES = {"fp32": "float32", "fp16": "float16"}
_FOLDER = click.Path(path_type=Path, file_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False)
_OPSET = click.option("--opset", type=click.IntRange(18, 20), default=18, show_default=True)


class _Group(click.Group):
    """Turns what the user can act on into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except IpaError as error:
            click.echo(f"ipa-export: {error}", err=True)
            sys.exit(2)
        except ModuleNotFoundError as error:  # the command is installed with the runtime alone, too
            click.echo(f"ipa-export: {missing_library(error, 'export')}", err=True)
            sys.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ipa-runtime")
def main() -> None:
    """Export Stable Diffusion and IP-Adapters to ONNX bundles that run without PyTorch."""


def _finite(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter("must be a finite number")
    return value


@main.command()
@click.option(
    "--base",
    required=True,
    metavar="DIR_OR_ID_OR_FILE",
    help="Stable Diffusion 1.x or XL: a pipeline in diffusers format, or a checkpoint file in the original layout.",
)
@click.option(
    "--adapter", "adapters", multiple=True, metavar="[NAME=]FILE", help="IP-Adapter file; the first is the default."
)
@click.option("--image-encoder", metavar="DIR_OR_ID", help="CLIP vision model; default: the pipeline's own.")
@base_changes
@click.option("--output", required=True, type=_FOLDER, metavar="BUNDLE", help="Folder to write.")
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default="fp32",
    show_default=True,
    help="Type of weights and activations.",
)
@_OPSET
@click.option(
    "--image-slots",
    type=click.IntRange(1, MAX_SLOTS),
    default=1,
    show_default=True,
    help="Adapters that one request can use; with masks, images.",
)
@click.option("--masks", "has_masks", is_flag=True, help="Let a request say where in the picture an image counts.")
@click.option(
    "--controlnet",
    "controlnets",
    multiple=True,
    metavar="[NAME=]DIR_OR_ID",
    help="ControlNet in diffusers format for this base model; may be repeated.",
)
@click.option(
    "--merged", type=_FILE, metavar="FILE", help="Also write one ONNX step graph with the default adapter inside."
)
@click.option("--merged-scale", type=float, callback=_finite, help="IP-Adapter scale fixed in it (default: 1).")
@click.option("--default-steps", type=click.IntRange(1, 1000), help="Steps of a request that names none.")
@click.option(
    "--default-guidance-scale", type=float, callback=_finite, help="Guidance scale of a request that names none."
)
@click.option("--default-scale", type=float, callback=_finite, help="IP-Adapter scale of a request that names none.")
@click.option("--force", is_flag=True, help="Replace an existing bundle, and the files of --merged.")
def onnx(
    base: str,
    adapters: tuple[str, ...],
    image_encoder: str | None,
    output: Path,
    dtype: str,
    opset: int,
    image_slots: int,
    has_masks: bool,
    controlnets: tuple[str, ...],
    merged: Path | None,
    merged_scale: float | None,
    default_steps: int | None,
    default_guidance_scale: float | None,
    default_scale: float | None,
    force: bool,
    **changes: Any,
) -> None:
    """Write a bundle: a folder of ONNX graphs that ipa-run needs, and nothing else."""
    if merged_scale is not None and merged is None:
        raise IpaError("--merged-scale goes with --merged FILE; requests to a bundle name a scale of their own")
    from ipa.export.publish import check_target

    check_target(output, force)
    from ipa.export.quiet import quiet_libraries

    quiet_libraries()
    from ipa.export.adapters import AdapterFile
    from ipa.export.build import ExportRequest, export_bundle, scheduler_advice
    from ipa.export.controlnets import ControlNetSource
    from ipa.export.merged import MergedOptions
    from ipa.export.progress import progress

    defaults = {
        "num_inference_steps": default_steps,
        "guidance_scale": default_guidance_scale,
        "ip_adapter_scale": default_scale,
    }
    request = ExportRequest(
        base=base,
        output=output,
        image_encoder=image_encoder,
        adapters=tuple(map(AdapterFile.parse, adapters)),
        dtype=DTYPES[dtype],
        opset=opset,
        force=force,
        slots=ImageSlots(image_slots, has_masks),
        controlnets=tuple(map(ControlNetSource.parse, controlnets)),
        merged=MergedOptions(merged, 1.0 if merged_scale is None else merged_scale) if merged else None,
        defaults={name: value for name, value in defaults.items() if value is not None},
        changes=parse_changes(**changes),
    )
    with progress("export") as show:
        manifest = export_bundle(request, show)
    size = sum(file.size for file in manifest.files()) / 2**20
    controls = f", ControlNets: {', '.join(manifest.controlnets)}" if manifest.controlnets else ""
    click.echo(f"{output}: {size:.1f} MiB, adapters: {', '.join(manifest.adapters) or 'none'}{controls}")
    if advice := scheduler_advice(output, manifest):
        click.echo(f"ipa-export: {advice}", err=True)
    if request.merged:
        click.echo(f"{merged}: one step, with adapter {manifest.defaults.adapter} at scale {request.merged.scale:g}")


@main.command()
@click.option("--bundle", required=True, type=_FOLDER, metavar="BUNDLE", help="Bundle to add to.")
@click.option("--adapter", required=True, metavar="[NAME=]FILE", help="IP-Adapter file.")
@_OPSET
@click.option("--default", "is_default", is_flag=True, help="Make it the bundle's default adapter.")
@click.option("--force", is_flag=True, help="Replace an adapter of the same name.")
def adapter(bundle: Path, adapter: str, opset: int, is_default: bool, force: bool) -> None:
    """Add one adapter to a bundle; the other graphs stay as they are."""
    from ipa.export.quiet import quiet_libraries

    quiet_libraries()
    from ipa.export.adapters import AdapterFile
    from ipa.export.bundle_adapters import add_adapter
    from ipa.export.progress import progress

    file = AdapterFile.parse(adapter)
    with progress("export") as show:
        manifest = add_adapter(bundle, file, force, is_default, opset, show)
    click.echo(f"{bundle}: adapters: {', '.join(manifest.adapters)} (default: {manifest.defaults.adapter})")


@main.command()
@click.option("--bundle", required=True, type=_FOLDER, metavar="BUNDLE", help="Bundle to validate.")
@click.option("--base", required=True, metavar="DIR_OR_ID_OR_FILE", help="Pipeline or checkpoint it was made of.")
@click.option("--adapter", "adapters", multiple=True, metavar="[NAME=]FILE", help="Adapter that is in it.")
@click.option(
    "--controlnet", "controlnets", multiple=True, metavar="[NAME=]DIR_OR_ID", help="ControlNet that is in it."
)
@click.option("--image-encoder", metavar="DIR_OR_ID", help="CLIP vision model; default: the pipeline's own.")
@base_files
@click.option("--engine", default="onnxruntime", show_default=True, metavar="NAME", help="Back-end to compare.")
def validate(
    bundle: Path,
    base: str,
    adapters: tuple[str, ...],
    controlnets: tuple[str, ...],
    image_encoder: str | None,
    engine: str,
    **changes: Any,
) -> None:
    """Compare every component, the whole step and a whole run with PyTorch.

    Name again what the bundle was made with: --image-encoder, --config, --vae, LoRAs and embeddings (their weights
    and words, and the layers that were skipped, are in it), and every adapter and ControlNet that is to be compared;
    the others are recorded as not compared.

    The figures of onnxruntime are written into the bundle; those of other engines belong to this machine and are
    printed alone.
    """
    from ipa.export.quiet import quiet_libraries

    quiet_libraries()
    from ipa.export.adapters import AdapterFile
    from ipa.export.controlnets import ControlNetSource
    from ipa.export.progress import progress
    from ipa.export.validate import Validator
    from ipa.export.validation_record import REFERENCE_ENGINE, record

    files = tuple(map(AdapterFile.parse, adapters))
    controls = tuple(map(ControlNetSource.parse, controlnets))
    validator = Validator(bundle, base, image_encoder, files, engine, parse_changes(**changes), controls)
    with progress("validate") as show:
        checks = list(validator.run(show))
    for check in checks:
        click.echo(check)
    if validator.engine == REFERENCE_ENGINE:
        record(bundle, checks, validator.bundle.manifest)
    failed = [check.name for check in checks if not check.passed]
    if failed:
        click.echo(f"ipa-export: {bundle} differs from its models in: {'; '.join(failed)}", err=True)
        sys.exit(1)


@main.command()
@click.argument("bundle", type=_FOLDER)
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def inspect(bundle: Path, form: str) -> None:
    """Show what a bundle holds: components, sizes, adapters, hashes, what wrote it."""
    from ipa.engines.bundle import Bundle
    from ipa.export.inspect import as_json, as_text

    opened = Bundle.open(bundle)
    click.echo(as_json(opened) if form == "json" else as_text(opened))


main.add_command(build_engines)
