"""`ipa-bench report`: what a record says is on both pages, exactly, and nothing else is."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from bench_records import (
    ARMS,
    BASELINE,
    FULL_QUALITY,
    FULL_SPEED,
    HOSTILE,
    MACHINE,
    ORIGIN,
    SETTING,
    contender,
    speed,
    write,
)

from ipa.benchmarks.intervals import Interval
from ipa.benchmarks.records import Difference, Gap, NotMeasured, QualityRecord, Sweep
from ipa.benchmarks.report_pages import read_records, write_report

# Of the two full records, as a reader wants them: from their numbers by hand.
SHOWN = [
    *("1.50 (1.46 to 1.55)", "1.03 (0.98 to 1.07)", "0.500 (0.480 to 0.520)", "1 (baseline)"),
    *("2.00 (1.75 to 2.25)", "0.500 (0.444 to 0.571)", "1.25 (1.00 to 1.50)", "0.800 (0.667 to 1.000)"),
    *("1.19", "1.11", "1.13", "25.5", "0.0392", "123", "45.6", "321", "7.89", "1.47", "8.12", "4.56", "77.7", "5,320"),
    *("1,230", "803.30 GFLOP", "2,514.5 GFLOP", "188 GFLOP/s", "12.7 GB/s", "settled after 3 blocks"),
    *("not settled after 10 blocks", "1.004 (0.997 to 1.012)", "no difference that this run could tell"),
    *("1.05 (1.05 to 1.06)", "5.50 (5.10 to 6.20) %", "6.31", "612", "1,890", "tensorrt", "no NVIDIA GPU"),
    *(
        "Test CPU 3000",
        "cores: 2",
        "15.6 GiB",
        "torch 2.13.0",
        "GPU: none",
        "2026-01-02T03:04:05+00:00",
        "72x64 pixels",
    ),
    *("ipa-bench speed --output out", "ipa-bench quality --samples 4", "guidance scale 3.5", "speed.json"),
    *("0.812 (0.801 to 0.823)", "0.254 (0.248 to 0.258)", "0.635 (0.620 to 0.645)", "25.4 (24.8 to 25.8)"),
    *("0.611 (0.595 to 0.633)", "23.4 (22.7 to 24.3)", "95.3 (90.6 to 98.4)", "45.2 (44.1 to 46.3)", "38.8"),
    *("0.0210 (0.0190 to 0.0240)", "0.667 (0.641 to 0.688)", "0.281 (0.262 to 0.301)", "299x299, bicubic"),
    *("no --dino DIR", "12.5 (6.2 to 18.8)", "+0.260 (+0.243 to +0.278)", "-0.00100 (-0.00210 to +0.00040)"),
    *("-0.0271 (-0.0313 to -0.0229)", "engine minus base", "engine minus torch-eager"),
]
SENTENCES = [
    "onnxruntime in bfloat16 is 1.50 times as fast as torch-eager in float32 (1.46 to 1.55).",
    "Between torch-compile and torch-eager there is no difference that this run could tell: "
    "a ratio of 1.03 (0.98 to 1.07).",
    f"{HOSTILE} is 0.500 times as fast as torch-eager (0.480 to 0.520), which is slower.",
    "Null: torch-eager against itself came out at 1.00 (0.99 to 1.01), which covers 1, as it must.",
    "Warm-up did not settle for torch-compile:",
    "With the image prompt, pictures are more like it than without it: on the same seeds, CLIP-I differs by "
    "+0.260 (+0.243 to +0.278) in the mean.",
    "CLIP-I of engine and torch-eager differs by -0.00100 (-0.00210 to +0.00040) in the mean on the same seeds: "
    "no difference that this run could tell.",
    "Of the pictures that engine and torch-eager drew from the same seeds, 12.5 % are equal, pixel by pixel; the "
    "others' PSNR is 45.2 (44.1 to 46.3) dB (the median; higher is closer), and of the two that differ most 38.8 dB.",
    "Scale sweep of the engine: the first 8 image prompts, pictures of each: 1",
    "CLIP-I and CLIP-T over the scale, with 95 % intervals: the first 8 image prompts, pictures of each: 1.",
    "Images per second are those of speed.json, joined by model, task, size, steps, scheduler, guidance and machine",
]


class Page(HTMLParser):
    """An HTML page taken apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.pieces: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)


def plain(markdown: str) -> str:
    """Markdown as a reader sees it."""
    return html.unescape(re.sub(r"\\([\\`*_\[\]|~$])", r"\1", markdown))


def pages(folder: Path, output: Path) -> tuple[str, str]:
    markdown, page = write_report(read_records([folder]), output)
    return markdown.read_text("utf-8"), page.read_text("utf-8")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("full") / "records", speed=FULL_SPEED, quality=FULL_QUALITY)


@pytest.fixture(scope="module")
def full(records: Path) -> tuple[str, str]:
    return pages(records, records.parent / "report")


def test_both_pages_show_every_figure(full: tuple[str, str]) -> None:
    markdown, page = full
    cells = {cell.strip(" |") for line in plain(markdown).splitlines() for cell in line.split(" | ")}
    seen = {"Markdown": plain(markdown), "HTML": " ".join(Page(page).pieces)}
    for name, text in seen.items():
        for shown in SHOWN:
            assert re.search(rf"(?<![\w.,]){re.escape(shown)}(?!,?\d)", text), f"{name} lacks {shown}"
        for sentence in SENTENCES:
            assert sentence in re.sub(r"\s+", " ", text), f"{name} lacks {sentence}"
    assert {"not measured", "none in this run", "no difference that this run could tell"} <= cells


def test_the_html_page_needs_nothing_else_and_runs_nothing(full: tuple[str, str]) -> None:
    page = Page(full[1])
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert links and all(link.startswith(("#", "data:image/")) for link in links)
    assert not re.search(r"@import|url\((?!#)", full[1])
    ids = Counter(value for name, value in page.attributes if name == "id")
    assert set(ids.values()) == {1}
    wanted = {link[1:] for link in links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", full[1]))
    assert wanted <= set(ids)
    assert page.tags.count("svg") == 5 and page.tags.count("img") == 1


def test_markdown_lets_no_name_through_as_markup(full: tuple[str, str]) -> None:
    assert "<script" not in full[0]
    heads = [line for line in full[0].splitlines() if line.startswith("| ")]
    for line in heads:  # a `|` in a name makes no column
        assert len(re.findall(r"(?<!\\)\|", line)) >= 3
    row = next(line for line in heads if "script" in line and "what" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 5


def test_markdown_names_the_files_beside_it(full: tuple[str, str], records: Path) -> None:
    output = records.parent / "report"
    named = re.findall(r"\]\((report/[^)]+)\)", full[0])
    assert len(named) == 6
    assert {f"report/{file.name}" for file in (output / "report").iterdir()} == set(named)
    for name in named:
        if name.endswith(".svg"):
            drawn = ElementTree.parse(output / name).getroot()
            assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    assert (output / "report/quality-sweep-sheet.png").read_bytes() == (records / "sweep.png").read_bytes()


def test_plots_show_names_and_values(full: tuple[str, str], records: Path) -> None:
    ratios = ElementTree.parse(records.parent / "report/report/speed-ratios.svg").getroot()
    texts = {"".join(text.itertext()) for text in ratios.iter("{http://www.w3.org/2000/svg}text")}
    assert {"null: torch-eager", "torch-compile", "onnxruntime", "1.50", "0.500", "1.03"} <= texts
    joined = ElementTree.parse(records.parent / "report/report/quality-speed.svg").getroot()
    names = {"".join(text.itertext()) for text in joined.iter("{http://www.w3.org/2000/svg}text")}
    assert {"onnxruntime", "torch-eager"} <= names and "base" not in names


def test_the_command_writes_the_same_bytes_again(full: tuple[str, str], records: Path, tmp_path: Path) -> None:
    code = "from ipa.benchmarks.cli import main; main()"
    command = [sys.executable, "-c", code, "report", "--records", str(records), "--output", str(tmp_path / "again")]
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "again/report.md"), str(tmp_path / "again/report.html")]
    first, second = (
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (records.parent / "report", tmp_path / "again")
    )
    assert first == second


def test_a_broken_null_takes_every_ratio_with_it(tmp_path: Path) -> None:
    record = speed(BASELINE, contender("x", 1.0, Interval(2.0, 1.9, 2.1, 9)), null=Interval(1.04, 1.02, 1.06, 9))
    for text in pages(write(tmp_path / "r", speed=record), tmp_path / "o"):
        assert "No ratio of this run should be believed" in text
        assert "came out at 1.04 (1.02 to 1.06), which does not cover 1" in text
        assert "times as fast as torch-eager (" not in text


def test_odd_records(tmp_path: Path) -> None:
    """No null, one contender, none at all, nothing but what must be there."""
    folder = write(
        tmp_path / "r",
        alone=speed(BASELINE, null=None, setting={}),
        no_null=speed(BASELINE, contender("x", 1.0, Interval(2.0, 1.9, 2.1, 9)), null=None),
        none=speed(not_measured=[NotMeasured("torch-eager", "out of memory")]),
        quality=QualityRecord(
            ORIGIN,
            {},
            [replace(ARMS[2], name="engine")],
            sweep=Sweep(1, 1, [0.5], [Interval(0.7, 0.7, 0.7, 1)], None, "sweep.png"),
        ),
    )
    for text in map(plain, pages(folder, tmp_path / "o")):
        assert "torch-eager makes 0.500 (0.444 to 0.571) steps per second; nothing was compared with it." in text
        assert "There is no null: torch-eager was not measured against itself" in text
        assert "out of memory" in text
        assert "0.552 (0.531 to 0.574)" in text
        assert not re.search(r"CLIP-T|DINO|FID|LPIPS|Build, s|device memory, MiB|\bNone\b|\bnan\b", text)


OTHERS = {
    "steps": replace(FULL_SPEED, setting=SETTING | {"steps": 20}),
    "task": replace(FULL_SPEED, setting=SETTING | {"task": "inpaint"}),
    "no guidance": replace(FULL_SPEED, setting=SETTING | {"guidance_scale": 1.0}),
    "no word of guidance": replace(FULL_SPEED, setting={k: v for k, v in SETTING.items() if k != "guidance_scale"}),
    "processor": replace(FULL_SPEED, origin=replace(ORIGIN, machine=MACHINE | {"cpu": "another"})),
    "GPU": replace(FULL_SPEED, origin=replace(ORIGIN, machine=MACHINE | {"gpu": "a GPU"})),
    "broken null": replace(FULL_SPEED, null=Interval(1.04, 1.02, 1.06, 9)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_speed_of_other_work_is_not_joined(case: str, tmp_path: Path) -> None:
    _, page = pages(write(tmp_path / "r", speed=OTHERS[case], quality=FULL_QUALITY), tmp_path / "o")
    assert "joined by model" not in page


def test_of_two_tasks_the_one_that_quality_drew_is_joined(tmp_path: Path) -> None:
    guided = replace(FULL_SPEED, setting=SETTING | {"guidance_scale": 7.5})  # costs what 3.5 costs
    records = {"speed_demo_img2img": replace(guided, setting=guided.setting | {"task": "img2img"})}
    records["speed_demo_variation_72x64"] = guided
    _, page = pages(write(tmp_path / "r", **records, quality=FULL_QUALITY), tmp_path / "o")
    assert "Images per second are those of speed_demo_variation_72x64.json, joined" in page
    assert "those of speed_demo_img2img.json" not in page


def headlines(tmp_path: Path, gap: Interval, **setting: Any) -> str:
    record = replace(
        FULL_QUALITY, setting=FULL_QUALITY.setting | setting, gaps=[Gap("engine", "base", "clip_i", gap)], sweep=None
    )
    markdown, _ = pages(write(tmp_path / "r", quality=record), tmp_path / "o")
    return plain(markdown.partition("## ")[0])


def test_the_effect_is_told_by_paired_differences(tmp_path: Path) -> None:
    """The arms' own intervals lie apart in all three."""
    text = headlines(tmp_path, Interval(0.26, -0.01, 0.53, 64))
    assert "this run could tell no effect: on the same seeds, CLIP-I differs by +0.260 (-0.010 to +0.530)" in text
    text = headlines(tmp_path, Interval(-0.26, -0.3, -0.22, 64), is_image_only=True)
    assert "From the image prompt alone, pictures are less like it than the base model's, from the text alone:" in text
    text = headlines(tmp_path, Interval(0.26, 0.26, 0.26, 1))
    assert "CLIP-I, likeness" in text and "effect" not in text and "more like" not in text and "differs" not in text


def test_equal_pictures_have_no_psnr(tmp_path: Path) -> None:
    equal = Difference("engine", "torch-eager", Interval(1.0, 1.0, 1.0, 64), None, None, None)
    record = replace(FULL_QUALITY, differences=[equal])
    for text in map(plain, pages(write(tmp_path / "r", quality=record), tmp_path / "o")):
        assert "drew from the same seeds, all are equal, pixel by pixel." in text
        assert "100 (100 to 100)" in text and "all equal" in text
    (differing,) = FULL_QUALITY.differences
    record = replace(FULL_QUALITY, differences=[replace(differing, equal=Interval(0.0, 0.0, 0.0, 64))])
    for text in map(plain, pages(write(tmp_path / "r", quality=record), tmp_path / "o")):
        assert "no two are equal; their PSNR is 45.2 (44.1 to 46.3) dB" in text


def test_records_of_several_folders_and_equal_names(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, run=speed(BASELINE)) for name in "ab")
    page = write_report(read_records([first, second, first]), tmp_path / "o")[1].read_text("utf-8")
    assert re.findall(r'<h2 id="([^"]+)"', page) == ["run", "run-2", "what-the-words-mean"]
