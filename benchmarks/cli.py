"""`ipa-bench`: how fast, how faithful, and a page that says so."""

from __future__ import annotations

import sys
from typing import Any

import click

from ipa.benchmarks.quality_cli import quality
from ipa.benchmarks.report_cli import report
from ipa.benchmarks.speed_cli import speed
from ipa.engines.errors import IpaError


class _Group(click.Group):
    """Turns what the user can act on into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except IpaError as error:
            click.echo(f"ipa-bench: {error}", err=True)
            sys.exit(2)
        except ModuleNotFoundError as error:  # the command is installed with the runtime alone, too
            missing = str(error.name).partition(".")[0]
            if missing == "ipa":
                raise
            click.echo(f"ipa-bench: {missing} is missing: pip install 'ipa-runtime[bench]'", err=True)
            sys.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ipa-runtime")
def main() -> None:
    """Measure speed and quality against PyTorch, and report both."""


main.add_command(report)
main.add_command(speed)
main.add_command(quality)
