"""`ipa-run --requests`: many requests, resumed, batched, with bad ones among them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ipa.engines import bundle
from ipa.engines.errors import EngineError, RequestError
from ipa.runtime import ImagePrompt, Pipeline, Request
from ipa.runtime.request_lines import read_lines
from ipa.runtime.request_run import RESULTS_FILE, RequestRun

FIELDS = {"num_inference_steps": 2, "height": 64, "width": 64, "guidance_scale": 4.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed in (1, 2):
        pixels = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((60, 60)).save(tmp_path / f"{seed}.png")
    return tmp_path


def write(folder: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    file = folder / "requests.jsonl"
    file.write_text("\n".join(lines))
    return file


def carry_out(file: Path, bundle: Path, batch: int = 1) -> tuple[RequestRun, list[tuple[int, str]]]:
    problems: list[tuple[int, str]] = []
    run = RequestRun(read_lines(file, FIELDS), file.parent / "out", bundle)
    with Pipeline.open(bundle, engine="onnxruntime") as pipeline:
        run.run(
            pipeline,
            batch,
            has_metadata=True,
            report=lambda line, result, problem: problems.append((line.number, problem)) if problem else None,
        )
    return run, problems


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path), int)


THREE = (
    {"id": "a", "image": "1.png", "prompt": "a cat", "seed": 1},
    {"id": "b", "image": "2.png", "prompt": "a red dog", "seed": 2, "num_samples": 2},
    {"id": "c", "prompt": "a cat", "seed": 3},
)


def test_pictures_are_those_of_single_requests(folder: Path, tiny_bundle: Path) -> None:
    run, problems = carry_out(write(folder, *THREE), tiny_bundle)
    assert (problems, run.summary.done) == ([], 3)
    assert sorted(path.name for path in run.output.glob("*.png")) == ["a.png", "b-0.png", "b-1.png", "c.png"]
    with Pipeline.open(tiny_bundle, engine="onnxruntime") as pipeline:
        request = Request(image=folder / "2.png", prompt="a red dog", seed=2, num_images=2, **FIELDS)
        for index, image in enumerate(pipeline.run(request).images):
            np.testing.assert_array_equal(pixels(run.output / f"b-{index}.png"), np.asarray(image))


def test_pictures_to_start_from_lie_beside_the_file(folder: Path, tiny_bundle: Path) -> None:
    line = {"id": "a", "prompt": "a cat", "init_image": "1.png", "mask_image": "2.png", "strength": 0.9, "seed": 1}
    run, problems = carry_out(write(folder, line), tiny_bundle)
    assert (problems, run.summary.done) == ([], 1)


def test_a_batch_shows_each_request_its_own_image(folder: Path, tiny_bundle: Path) -> None:
    same_shapes = [{**THREE[0], "id": str(seed), "image": f"{1 + seed % 2}.png", "seed": seed} for seed in range(4)]
    alone, _ = carry_out(write(folder, *same_shapes), tiny_bundle)
    single = {path.name: pixels(path) for path in alone.output.glob("*.png")}
    for path in alone.output.iterdir():
        path.unlink()
    together, _ = carry_out(write(folder, *same_shapes), tiny_bundle, batch=4)
    assert together.summary.done == 4
    for name, expected in single.items():  # the same sums in kernels tiled for another batch
        assert np.abs(pixels(together.output / name) - expected).max() <= 2


def test_what_is_done_is_not_done_again(folder: Path, tiny_bundle: Path) -> None:
    file = write(folder, *THREE)
    first, _ = carry_out(file, tiny_bundle)
    (first.output / "a.png").unlink()
    with (first.output / RESULTS_FILE).open("a") as results:
        results.write('{"id": "c", "ima')  # cut off by a crash
    write(folder, *THREE[:2], {**THREE[2], "seed": 4}, {"id": "d", "prompt": "a dog", "seed": 0})
    second, _ = carry_out(file, tiny_bundle)
    assert (second.summary.done, second.summary.skipped) == (3, 1)  # a lost its picture, c has changed, d is new
    third, _ = carry_out(file, tiny_bundle)
    assert (third.summary.done, third.summary.skipped) == (0, 4)

    Image.new("RGB", (30, 30), "red").save(folder / "1.png")  # another picture of the same name
    results = third.output / RESULTS_FILE
    records = [json.loads(line) for line in results.read_text().splitlines() if line.endswith("}")]
    for record in records:
        if record["id"] == "c":
            record["models"]["unet"] = "of another bundle"
    results.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    fourth, _ = carry_out(file, tiny_bundle)
    assert (fourth.summary.done, fourth.summary.skipped) == (2, 2)


def test_bad_lines_do_not_stop_the_rest(folder: Path, tiny_bundle: Path) -> None:
    bad = (
        "{",
        "[1]",
        {"id": "../x", "prompt": "a"},
        {"id": "a", "prompt": "twice"},
        {"prompt": "a", "colour": "red"},
        {"prompt": "a", "num_inference_steps": 0},
        {"prompt": "a", "image": "missing.png"},
        {"prompt": "a", "image": "1.png", "adapter": "unknown"},
        {},
        {"prompt": "a", "image_prompts": [{"images": []}]},
    )
    run, problems = carry_out(write(folder, THREE[0], "", *bad, THREE[2]), tiny_bundle, batch=8)
    assert [number for number, _ in sorted(problems)] == [*range(3, 13)]
    assert (run.summary.done, run.summary.failed) == (2, 10)
    said = dict(problems)
    for number, part in ((3, "not JSON"), (5, "'../x'"), (6, "line 1"), (7, "'colour'"), (9, "missing.png")):
        assert part in said[number]


def test_pictures_of_one_name_are_refused(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        *({"id": name, "prompt": "a", "num_images": n} for name, n in (("a", 2), ("A-1", 1), ("b", 1), ("B", 1))),
    )
    lines = read_lines(file, {})
    assert [bool(line.problem) for line in lines] == [False, True, False, True]
    assert "the picture A-1.png would be that of line 1, too" in lines[1].problem


def test_what_one_line_meets_does_not_stop_the_rest(
    folder: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that refuses one request, a folder where a picture should go."""
    run_batch = Pipeline.run_batch

    def refusing(self: Pipeline, requests: list[Request], *others: Any) -> Any:
        if any(request.seed == 7 for request in requests):
            raise EngineError("unet: the output overflowed")
        return run_batch(self, requests, *others)

    monkeypatch.setattr(Pipeline, "run_batch", refusing)
    (folder / "out" / "c.png").mkdir(parents=True)
    run, problems = carry_out(write(folder, {**THREE[0], "seed": 7}, THREE[2], {**THREE[2], "id": "d"}), tiny_bundle)
    assert (run.summary.done, run.summary.failed) == (1, 2)
    assert [number for number, _ in problems] == [1, 2]
    assert "overflowed" in problems[0][1] and "is a folder" in problems[1][1]


def test_what_every_line_would_meet_stops_at_once(
    folder: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(folder, *THREE)
    with pytest.raises(RequestError, match=r"x\.png: is a picture, and --requests makes many"):
        RequestRun(read_lines(file, FIELDS), folder / "x.png", tiny_bundle)
    assert not (folder / "x.png").exists()

    def no_engine(*_: Any) -> Any:
        raise EngineError("no engine")

    with monkeypatch.context() as patch, pytest.raises(EngineError, match="no engine"):
        patch.setattr(bundle, "open_engine", no_engine)
        carry_out(file, tiny_bundle)

    with monkeypatch.context() as patch, pytest.raises(RequestError, match=r"results\.jsonl: cannot be written"):
        patch.setattr(os, "pread", full)
        (folder / "out" / RESULTS_FILE).write_text("{}")
        carry_out(file, tiny_bundle)


def full(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_one_spoilt_request_of_a_batch_fails_alone(folder: Path, tiny_bundle: Path) -> None:
    file = write(folder, *({**THREE[0], "id": name, "image": f"{name}.png"} for name in ("1", "gone", "2")))
    run, problems = carry_out(file, tiny_bundle, batch=3)
    assert (run.summary.done, [number for number, _ in problems]) == (2, [2])


@pytest.mark.parametrize(
    "fields",
    [
        {"guidance_scale": 10**400},  # a whole number that no float holds
        {"guidance_scale": 1e40},
        {"image": "1.png", "ip_adapter_scale": -(10**400)},
        {"image": "1.png", "ip_adapter_scale": 1e40},
        {"controls": [{"image": "1.png", "scale": 10**400}]},
        {"controls": [{"image": "1.png", "scale": 1e40}]},
    ],
)
def test_absurd_numbers_are_refused_line_by_line(folder: Path, fields: dict[str, Any]) -> None:
    first, second = read_lines(write(folder, {"prompt": "a cat", **fields}, THREE[2]), {})
    assert "expected a finite number of at most 1000" in first.problem
    assert second.problem == ""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"image": "1.png"}, {"image": "1.png", "adapter": "a", "ip_adapter_scale": 0.5}),
        ({"image": "1.png", "ip_adapter_scale": 0.2}, {"image": "1.png", "adapter": "a", "ip_adapter_scale": 0.2}),
        ({}, {}),  # an adapter and its scale say nothing without an image
        ({"image_prompts": [{"images": ["1.png"]}]}, {"image": "1.png"}),
        ({"image_prompts": [{"embeds": "e", "end": 0.5}]}, {"image_prompts": (ImagePrompt(embeds="e", end=0.5),)}),
    ],
)
def test_options_of_the_command_are_defaults_of_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, line: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Here `--adapter a=0.5`; a line's own `image_prompts` say everything themselves."""
    monkeypatch.chdir(write(folder, {"prompt": "a cat", **line}).parent)
    (found,) = read_lines(Path("requests.jsonl"), {}, [{"adapter": "a", "scale": 0.5}])
    assert (found.problem, found.request) == ("", Request(prompt="a cat", **expected))


def test_a_line_ends_where_json_says(tmp_path: Path) -> None:
    """U+2028 and U+0085 may stand in a JSON string, and a byte order mark before the first line."""
    prompts = ["one\u2028two", "one\u0085two"]
    text = "\r\n".join(json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts)
    (tmp_path / "requests.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    lines = read_lines(tmp_path / "requests.jsonl", {})
    assert [(line.request and line.request.prompt, line.problem) for line in lines] == [(one, "") for one in prompts]


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"])
def test_files_that_hold_no_requests(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "requests.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RequestError, match=r"--requests .*requests\.jsonl"):
        read_lines(file, {})


def test_the_command(folder: Path, tiny_bundle: Path) -> None:
    file = write(folder, THREE[0], "{")
    command = [Path(sys.executable).parent / "ipa-run", "--requests", file, "--bundle", tiny_bundle, "--steps", "1"]
    command += ["--height", "64", "--width", "64", "--output", folder / "out", "--engine", "onnxruntime"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "line 2: is not JSON" in done.stderr
    assert "1 done, 0 done before, 1 failed" in done.stdout
    assert "Traceback" not in done.stderr
    assert (folder / "out" / "a.png").is_file()
