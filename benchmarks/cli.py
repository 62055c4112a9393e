"""`ipa-bench`: how fast, how faithful, and a page that says so."""

from __future__ import annotations

import click

from ipa.benchmarks.command import Group
from ipa.benchmarks.quality_cli import quality
from ipa.benchmarks.report_cli import report
from ipa.benchmarks.speed_cli import speed


@click.group("ipa-bench", cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ipa-runtime")
def main() -> None:
    """Measure speed and quality against PyTorch, and report both."""


main.add_command(report)
main.add_command(speed)
main.add_command(quality)
