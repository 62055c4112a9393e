"""`ipa-export build-engines`: options, progress and report; the work is in `ipa.export.engine_builds`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ipa.engines.errors import RequestError
from ipa.export.base_options import base_changes

if TYPE_CHECKING:
    from ipa.export.engine_builds import Outcome, Percent

_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command("build-engines")
@click.option("--bundle", type=_FOLDER, metavar="BUNDLE", help="Bundle to build engines for.")
@click.option(
    "--base", metavar="DIR_OR_ID_OR_FILE", help="Export this pipeline or checkpoint to --output first, in FP16."
)
@click.option("--adapter", "adapters", multiple=True, metavar="[NAME=]FILE", help="With --base: IP-Adapter file.")
@click.option("--image-encoder", metavar="DIR_OR_ID", help="With --base: CLIP vision model.")
@click.option("--controlnet", "controlnets", multiple=True, metavar="[NAME=]DIR_OR_ID", help="With --base: ControlNet.")
@base_changes
@click.option("--output", type=_FOLDER, metavar="BUNDLE", help="With --base: bundle to write.")
@click.option("--engine", type=click.Choice(["tensorrt", "tensorrt-rtx"]), required=True, help="Library to build with.")
@click.option(
    "--resolution",
    "resolutions",
    multiple=True,
    metavar="WIDTHxHEIGHT",
    help="Size of pictures; more than once: everything between the smallest and the largest, fastest at the first. "
    "[default: the bundle's own]",
)
@click.option("--batch", default="1:1:4", show_default=True, metavar="MIN:OPT:MAX", help="Pictures a call.")
@click.option(
    "--image-tokens",
    default="4:4:1028",
    show_default=True,
    metavar="MIN:OPT:MAX",
    help="Tokens of the image prompt; none at all is always possible.",
)
@click.option(
    "--compute-capability",
    "capabilities",
    metavar="LIST",
    help="GPUs to build for, such as 8.6,8.9; tensorrt-rtx alone. [default: 8.0 and later]",
)
@click.option(
    "--cache", type=_FOLDER, metavar="DIR", help="Where engines are kept. [default: $IPA_CACHE, ~/.cache/ipa]"
)
@click.option("--jobs", type=click.IntRange(1, 16), default=1, show_default=True, help="Builds at the same time.")
@click.option("--force", is_flag=True, help="Build what is there, too; with --base: replace the bundle.")
@click.pass_context
def build_engines(
    context: click.Context,
    /,
    bundle: Path | None,
    base: str | None,
    adapters: tuple[str, ...],
    image_encoder: str | None,
    controlnets: tuple[str, ...],
    output: Path | None,
    engine: str,
    resolutions: tuple[str, ...],
    batch: str,
    image_tokens: str,
    capabilities: str | None,
    cache: Path | None,
    jobs: int,
    force: bool,
    **changes: Any,
) -> None:
    """Build engines for NVIDIA GPUs into the user's cache; what fits is kept.

    TensorRT builds on the GPU that will run the engines. TensorRT-RTX needs no GPU to build.
    """
    from ipa.engines.bundle import Bundle
    from ipa.engines.machine import default_cache
    from ipa.engines.plan_cache import PlanCache
    from ipa.engines.shape_profile import ShapeProfile
    from ipa.export.engine_builds import EngineBuilds, target

    model = {"adapters": adapters, "image_encoder": image_encoder, "controlnets": controlnets, **changes}
    root = _source(bundle, base, output, model)
    wanted = tuple(part.strip() for part in capabilities.split(",")) if capabilities else ()
    ShapeProfile.parse(resolutions or ["512x512"], batch, image_tokens)  # before the minutes that an export takes
    target(engine, wanted)
    plans = PlanCache(cache or default_cache())
    if base is not None:
        command = context.parent and context.parent.command
        assert isinstance(command, click.Group)
        context.invoke(
            command.commands["onnx"],
            base=base,
            adapters=adapters,
            image_encoder=image_encoder,
            controlnets=controlnets,
            output=root,
            dtype="fp16",
            force=force,
            **changes,
        )
    opened = Bundle.open(root, verify=False)  # what is built is hashed before
    defaults = opened.manifest.defaults
    profile = ShapeProfile.parse(resolutions or [f"{defaults.width}x{defaults.height}"], batch, image_tokens)
    builds = EngineBuilds(opened, plans, engine, profile, wanted)
    kept, missing = builds.survey(force)
    for job in missing:
        click.echo(f"to build: {job.component}, {job.prediction} ({job.reason})", err=True)
    with _bars() as percent:
        outcomes = [*kept, *builds.run(missing, jobs, percent)]
    for outcome in outcomes:
        click.echo(_line(outcome))
    size = sum(outcome.header.size for outcome in outcomes) / 2**20
    click.echo(f"{root}: {len(missing)} built, {len(kept)} kept, {size:.1f} MiB of engines")


def _source(bundle: Path | None, base: str | None, output: Path | None, model: Mapping[str, object]) -> Path:
    """The bundle's folder, from either way to name it; `model` holds the options that describe a base model."""
    if bundle is not None and base is None:
        if given := [name for name, value in {**model, "output": output}.items() if value]:
            option = f"--{given[0].replace('_', '-').removesuffix('s')}"
            raise RequestError(f"{option} goes with --base; add an adapter to a bundle with `ipa-export adapter`")
        return bundle
    if bundle is None and base is not None and output is not None:
        return output
    raise RequestError("name a bundle with --bundle, or a pipeline with --base and the bundle to write with --output")


def _line(outcome: Outcome) -> str:
    header = outcome.header
    what = f"built in {header.seconds:.0f} s, {header.peak_mib:.0f} MiB of memory" if outcome.was_built else "kept"
    return f"{outcome.component:20} {header.size / 2**20:8.1f} MiB  {what} ({outcome.reason})"


@contextmanager
def _bars() -> Iterator[Percent]:
    """A bar for each engine on a terminal, a line when it starts and ends elsewhere."""
    from tqdm import tqdm

    bars: dict[str, tqdm[None]] = {}

    def on_terminal(component: str, done: int) -> None:
        if component not in bars:
            bars[component] = tqdm(total=100, desc=component, unit="%", leave=False)
        bars[component].update(done - bars[component].n)

    def elsewhere(component: str, done: int) -> None:
        if done in (0, 100):
            print(f"build {component}{'' if done == 0 else ': done'}", file=sys.stderr, flush=True)

    try:
        yield on_terminal if sys.stderr.isatty() else elsewhere
    finally:
        for bar in bars.values():
            bar.close()
