"""`ipa-run`: pictures from an image and a prompt."""

from __future__ import annotations

import json
import signal
import sys
from importlib.metadata import version
from typing import Any

import click

from ipa.engines.errors import IpaError

# Those of `ipa.runtime.schedulers.SCHEDULER_NAMES`, written out: the help needs no numpy.
SCHEDULERS = "ddim, pndm, euler, euler-ancestral, dpm++-2m, dpm++-2m-karras, unipc, lcm, ddpm"
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--image", metavar="FILE", help="The image prompt. Without it the base model runs alone.")
@click.option("--prompt", metavar="TEXT", help="What to draw; may be left out when there is an image.")
@click.option("--bundle", metavar="DIR", help="What `ipa-export onnx` wrote.  [default: the demo bundle]")
@click.option("--negative-prompt", metavar="TEXT", help="What to move away from.")
@click.option("--adapter", metavar="NAME", help="Which of the bundle's adapters.  [default: the bundle's]")
@click.option("--ip-adapter-scale", type=float, metavar="S", help="Weight of the image; 0 is the base model.")
@click.option("--guidance-scale", type=float, metavar="G", help="Classifier-free guidance; 1 switches it off.")
@click.option("--steps", "num_inference_steps", type=int, metavar="N", help="Denoising steps.")
@click.option("--seed", type=int, metavar="N", help="0 to 2**64 - 1.  [default: drawn, and reported]")
@click.option("--num-images", type=int, metavar="N", help="How many pictures to make at once.  [default: 1]")
@click.option("--height", type=int, metavar="H", help="Pixels, a multiple of 8.")
@click.option("--width", type=int, metavar="W", help="Pixels, a multiple of 8.")
@click.option("--scheduler", metavar="NAME", help=f"Noise scheduler: {SCHEDULERS}.  [default: the bundle's]")
@click.option("--eta", type=float, metavar="E", help="Noise added back at each DDIM step, 0 to 1.  [default: 0]")
@click.option("--engine", metavar="NAME", help="auto, or one of those that `ipa-doctor` lists.  [default: auto]")
@click.option("--trust-engines", metavar="DIR", help="Run the engine plans in DIR, native code that others built.")
@click.option("--output", metavar="FILE_OR_DIR", help="A .png file, or a folder.  [default: the current folder]")
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
    trust_engines: str | None,
    no_metadata: bool,
    timings: bool,
    output_format: str,
    **fields: Any,
) -> None:
    """Make pictures from an image and a prompt.

    The paths of the pictures go to standard output, progress and warnings to standard error.
    """
    from ipa.runtime.job import Job

    given = {name: value for name, value in fields.items() if value is not None}
    places = {"bundle": bundle, "output": output, "source": source, "trust_engines": trust_engines}
    job = Job.plan(given, engine=engine, **places)
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


def _progress(count: int) -> Any:
    """A progress bar over `count` steps with a rate; silent without a terminal."""
    from tqdm import tqdm

    return tqdm(total=count, unit="step", file=sys.stderr, disable=not sys.stderr.isatty(), leave=False)


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
