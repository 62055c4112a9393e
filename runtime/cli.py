"""`ipa-run`: pictures from an image and a prompt."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import click

from ipa.engines.errors import IpaError

# Those of `ipa.runtime.schedulers.SCHEDULER_NAMES`, written out: the help needs no numpy.
SCHEDULERS = "ddim, pndm, euler, euler-ancestral, dpm++-2m, dpm++-2m-karras, unipc, lcm, ddpm"
EXIT_FAILED = 1  # some requests of many
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


def _pair(separator: str) -> Callable[[click.Context, click.Parameter, str | None], tuple[int, int] | None]:
    """Reads two whole numbers, `WxH` or `X,Y`, as diffusers has them: the vertical one first."""

    def parse(context: click.Context, option: click.Parameter, text: str | None) -> tuple[int, int] | None:
        if text is None:
            return None
        numbers = text.split(separator)
        if len(numbers) != 2 or not all(re.fullmatch("[0-9]{1,9}", number) for number in numbers):
            raise click.BadParameter(f"{text!r} is not {option.metavar}, such as 1024{separator}768")
        return int(numbers[1]), int(numbers[0])

    return parse


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--image", multiple=True, metavar="[NAME=]FILE", help="The image prompt; several count together.")
@click.option("--prompt", metavar="TEXT", help="What to draw; may be left out when there is an image.")
@click.option("--bundle", metavar="DIR", help="What `ipa-export onnx` wrote.  [default: the demo bundle]")
@click.option("--negative-prompt", metavar="TEXT", help="What to move away from.")
@click.option("--adapter", multiple=True, metavar="NAME[=S]", help="Adapter, and its scale.  [default: the bundle's]")
@click.option(
    "--ip-adapter-scale",
    multiple=True,
    metavar="[NAME=]S",
    help="Weight of the image; 0 is the base model. Or by block: JSON, or style, layout, style+layout.",
)
@click.option("--ip-adapter-mask", multiple=True, metavar="[NAME=]FILE", help="Where an image counts: white. In order.")
@click.option("--image-embeds", multiple=True, metavar="[NAME=]FILE", help="Features of --save-image-embeds, no image.")
@click.option("--save-image-embeds", metavar="FILE", help="Write the features of the image prompt: .safetensors.")
@click.option("--ip-adapter-start", multiple=True, metavar="[NAME=]F", help="From this share of the steps on, 0 to 1.")
@click.option("--ip-adapter-end", multiple=True, metavar="[NAME=]F", help="Up to this share of the steps.")
@click.option("--init-image", metavar="FILE", help="The picture to start from: image to image.")
@click.option("--mask-image", metavar="FILE", help="Where it is made anew: white. Inpainting.")
@click.option("--strength", type=float, metavar="F", help="How far from it, above 0 up to 1.  [default: 0.8; mask: 1]")
@click.option("--control-image", multiple=True, metavar="[NAME=]FILE", help="What a ControlNet is to follow.")
@click.option("--controlnet-scale", multiple=True, metavar="[NAME=]S", help="Weight of a ControlNet.  [default: 1]")
@click.option("--control-start", multiple=True, metavar="[NAME=]F", help="From this share of the steps on, 0 to 1.")
@click.option("--control-end", multiple=True, metavar="[NAME=]F", help="Up to this share of the steps.")
@click.option("--guess-mode/--no-guess-mode", default=None, help="ControlNets count beyond what the prompt says.")
@click.option("--guidance-scale", type=float, metavar="G", help="Classifier-free guidance; 1 switches it off.")
@click.option("--guidance-rescale", type=float, metavar="R", help="0 to 1, against glare at large G.  [default: 0]")
@click.option("--steps", "num_inference_steps", type=int, metavar="N", help="Denoising steps.")
@click.option("--seed", type=int, metavar="N", help="0 to 2**64 - 1.  [default: drawn, and reported]")
@click.option("--num-images", type=int, metavar="N", help="How many pictures to make at once.  [default: 1]")
@click.option("--height", type=int, metavar="H", help="Pixels, a multiple of 8.")
@click.option("--width", type=int, metavar="W", help="Pixels, a multiple of 8.")
@click.option(
    "--original-size",
    callback=_pair("x"),
    metavar="WxH",
    help="SDXL: as if cut from so large.",
)
@click.option("--crop", "crops_coords_top_left", callback=_pair(","), metavar="X,Y", help="SDXL: as if cut here.")
@click.option("--target-size", callback=_pair("x"), metavar="WxH", help="SDXL: as if made so large.")
@click.option("--scheduler", metavar="NAME", help=f"Noise scheduler: {SCHEDULERS}.  [default: the bundle's]")
@click.option("--eta", type=float, metavar="E", help="Noise added back at each DDIM step, 0 to 1.  [default: 0]")
@click.option("--engine", metavar="NAME", help="auto, or one of those that `ipa-doctor` lists.  [default: auto]")
@click.option("--trust-engines", metavar="DIR", help="Run the engine plans in DIR, native code that others built.")
@click.option("--output", metavar="FILE_OR_DIR", help="A .png file, or a folder.  [default: the current folder]")
@click.option("--requests", metavar="FILE", help="JSONL: an object a line with an id and fields of a request.")
@click.option(
    "--batch", type=click.IntRange(1), metavar="N", help="Pictures at once of --requests.  [default: by engine]"
)
@click.option("--from", "source", metavar="PNG", help="Make a picture of ours again; other options override its own.")
@click.option("--no-metadata", is_flag=True, help="Write PNG files without the request.")
@click.option("--timings", is_flag=True, help="Print the time of each stage.")
@click.option("--format", "output_format", type=click.Choice(["text", "json"]), default="text", help="Of the result.")
@click.version_option(version("ipa-runtime"), prog_name="ipa-run")
def run(
    bundle: str | None,
    engine: str | None,
    output: str | None,
    source: str | None,
    save_image_embeds: str | None,
    trust_engines: str | None,
    requests: str | None,
    batch: int | None,
    no_metadata: bool,
    timings: bool,
    output_format: str,
    **fields: Any,
) -> None:
    """Make pictures from an image and a prompt.

    The paths of the pictures go to standard output, progress and warnings to standard error.
    """
    from ipa.runtime.control_options import CONTROL_OPTIONS, control_fields
    from ipa.runtime.image_options import OPTIONS, image_options
    from ipa.runtime.job import Job

    prompts = image_options({name: fields.pop(name) for name in OPTIONS})
    controls = control_fields({name: fields.pop(name) for name in CONTROL_OPTIONS})
    given = {name: value for name, value in fields.items() if value is not None} | controls
    if requests is not None or batch is not None:
        if requests is None or source is not None or timings or save_image_embeds is not None:
            raise click.UsageError(
                "--batch goes with --requests, which goes without --from, --timings and --save-image-embeds"
            )
        lines = requests, given, prompts
        _run_requests(*lines, bundle, engine, output, trust_engines, batch, not no_metadata, output_format)
        return
    places = {"bundle": bundle, "output": output, "source": source, "trust_engines": trust_engines}
    places["save_embeds"] = save_image_embeds
    job = Job.plan(given, prompts, engine=engine, **places)
    report = job.run(has_metadata=not no_metadata, show=_progress, check=_Interrupt().check)
    if job.engine == "auto" and sys.stderr.isatty():
        click.echo(f"ipa-run: engine {report.engine}", err=True)
    for warning in report.warnings:
        click.echo(f"ipa-run: warning: {warning}", err=True)
    if output_format == "json":
        click.echo(json.dumps(report.record(), indent=1))
        return
    for path in report.paths:
        click.echo(path)
    if timings:
        click.echo(report.timings())


def _run_requests(
    requests: str,
    defaults: dict[str, Any],
    prompts: list[Any],
    bundle: str | None,
    engine: str | None,
    output: str | None,
    trust_engines: str | None,
    batch: int | None,
    has_metadata: bool,
    output_format: str,
) -> None:
    """Carry out a file of requests; exit code 1 if some could not be."""
    from pathlib import Path

    from ipa.runtime.demo import demo_bundle
    from ipa.runtime.pipeline import Pipeline
    from ipa.runtime.request_lines import read_lines
    from ipa.runtime.request_run import RequestRun, usual_batch

    lines = read_lines(Path(requests), defaults, prompts)
    folder = None if bundle is None else Path(bundle)
    run = RequestRun(lines, Path(output or "."), folder)
    with _progress(len(lines), "request") as bar:

        def report(line: Any, result: Any, problem: str) -> None:
            bar.update()
            if problem:
                bar.write(f"ipa-run: {requests}, line {line.number}: {problem}", file=sys.stderr)
            for warning in result.warnings if result is not None else ():
                bar.write(f"ipa-run: warning: {requests}, line {line.number}: {warning}", file=sys.stderr)

        plans = None if trust_engines is None else Path(trust_engines)
        with Pipeline.open(folder or demo_bundle(), engine=engine or "auto", trust_engines=plans) as pipeline:
            size = batch or usual_batch(pipeline)
            check = _Interrupt().check
            summary = run.run(pipeline, size, has_metadata=has_metadata, report=report, check=check)
    click.echo(json.dumps(asdict(summary)) if output_format == "json" else f"{run.output}: {summary}")
    if summary.failed:
        sys.exit(EXIT_FAILED)


class _Interrupt:
    """Ctrl-C, remembered: where a library calls back into Python, the exception that it raises may be swallowed."""

    def __init__(self) -> None:
        self._came = False
        signal.signal(signal.SIGINT, self._note)

    def _note(self, signum: int, frame: object) -> None:
        self._came = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise it again if it came."""
        if self._came:
            raise KeyboardInterrupt


def _progress(count: int, unit: str = "step") -> Any:
    """A progress bar with a rate; silent without a terminal."""
    from tqdm import tqdm

    return tqdm(total=count, unit=unit, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False)


def main() -> None:
    """Entry point: exit code 2 and one message for whatever the user can mend."""
    try:
        run(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("ipa-run: interrupted; no picture was left half-written", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        click.echo(f"ipa-run: {error.format_message()}; see `ipa-run --help`", err=True)
        sys.exit(EXIT_USAGE)
    except IpaError as error:
        click.echo(f"ipa-run: {error}", err=True)
        sys.exit(EXIT_USAGE)
    except MemoryError:
        click.echo("ipa-run: out of memory; try a smaller --height, --width or --num-images", err=True)
        sys.exit(EXIT_USAGE)
