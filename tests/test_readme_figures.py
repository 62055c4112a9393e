"""The README's benchmark tables are those that `ipa-bench report` makes of the records in `benchmarks/results/`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ipa.benchmarks.report_pages import read_records, write_report

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"<!-- of (\S+\.json) -->\n\n((?:\|.*\n)+)")
TABLES = MARK.findall((ROOT / "README.md").read_text("utf-8"))


def test_there_are_tables_of_records() -> None:
    assert {file for file, _ in TABLES} >= {"speed_sd15_variation.json"}


@pytest.mark.parametrize(("file", "table"), TABLES, ids=[f"{file}-{index}" for index, (file, _) in enumerate(TABLES)])
def test_every_row_is_the_record_s(file: str, table: str, tmp_path: Path) -> None:
    records = [(path, record) for path, record in read_records([ROOT / "benchmarks" / "results"]) if path.name == file]
    page, _ = write_report(records, tmp_path)
    rows = page.read_text("utf-8").splitlines()
    for row in table.splitlines():
        assert row in rows, row
