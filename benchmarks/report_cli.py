"""`ipa-bench report`: records to pages."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "--records",
    "folders",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of records: OUTPUT of `speed` or `quality`; may be repeated.  [default: benchmarks/results]",
)
@click.option("--output", required=True, type=click.Path(path_type=Path), metavar="OUTPUT", help="Folder to write to.")
def report(folders: tuple[Path, ...], output: Path) -> None:
    """Write report.md and report.html from the records of `speed` and `quality`."""
    from ipa.benchmarks.report_pages import read_records, write_report

    for page in write_report(read_records(folders or [Path("benchmarks/results")]), output):
        click.echo(page)
