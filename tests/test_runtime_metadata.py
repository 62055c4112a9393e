"""The request in a PNG: read back by us, and by an independent reading of AUTOMATIC1111's rules."""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ipa.engines.errors import RequestError
from ipa.runtime import ControlImage, Request
from ipa.runtime.metadata import parameters_text, pnginfo, read_request
from ipa.runtime.request_record import request_record
from ipa.runtime.schedulers import SCHEDULER_NAMES

REQUEST: dict[str, Any] = {
    "prompt": "a red circle",
    "negative_prompt": "",
    "image": "cat.png",
    "adapter": "base",
    "ip_adapter_scale": 0.6,
    "guidance_scale": 7.5,
    "num_inference_steps": 25,
    "seed": 0,
    "num_images": 1,
    "only": None,
    "height": 512,
    "width": 768,
    "scheduler": "ddim",
    "eta": 0.0,
    "version": "0.1.0",
}

PROMPTS = [
    "",
    "a cat",
    'a "quoted" cat, with \\ backslash, and: colon',
    "line one\nline two\n\nline four",
    "Steps: 5, Sampler: Euler a, CFG scale: 1, Seed: 9, Size: 1x1",
    "first\nSteps: 5, Sampler: Euler a, CFG scale: 1, Seed: 9, Size: 1x1",
    'x, ipa_request: "{}"',
    'x\n, ipa_request: "{}", a: 1, b: 2, c: 3',
    "größe 猫 🐱 \u2028 separator",
    "tab\there",
    "café",  # latin-1: a plain text chunk
]


def a1111_reads(text: str) -> dict[str, str]:
    """What AUTOMATIC1111 takes from a `parameters` text: its published grammar, implemented anew."""
    pair = re.compile(r'\s*(?P<key>\w[\w \-/]+):\s*(?P<value>"(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    lines = text.strip().split("\n")
    settings = lines.pop() if len(pair.findall(lines[-1])) >= 3 else ""
    sides: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    side = "Prompt"
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            side, line = "Negative prompt", line.removeprefix("Negative prompt:").strip()
        sides[side].append(line)
    result = {name: "\n".join(side_lines).removeprefix("\n") for name, side_lines in sides.items()}
    for match in pair.finditer(settings):
        value = match["value"]
        result[match["key"]] = json.loads(value) if value.startswith('"') else value
    return result


def save(tmp_path: Path, info: PngInfo | None) -> Path:
    path = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


# --- round trip -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [*PROMPTS, "Negative prompt: inside\nNegative prompt: again"])
@pytest.mark.parametrize("negative", ["", "blurry, bad", 'two\nlines "q"', "Steps: 3, a: 1, b: 2, c: 3"])
def test_our_request_comes_back_exactly(tmp_path: Path, prompt: str, negative: str) -> None:
    request = {**REQUEST, "prompt": prompt, "negative_prompt": negative}
    assert read_request(save(tmp_path, pnginfo(request))) == request


def test_file_names_that_are_no_text_come_back(tmp_path: Path) -> None:
    request = {**REQUEST, "image": "caf\udce9 ☕.png"}  # how Python names a file whose bytes are not UTF-8
    assert read_request(save(tmp_path, pnginfo(request))) == request


def test_large_seeds_and_long_prompts_come_back(tmp_path: Path) -> None:
    request = {**REQUEST, "seed": 2**64 - 1, "prompt": "🐱" * 20_000, "negative_prompt": "🐶" * 20_000}
    assert read_request(save(tmp_path, pnginfo(request))) == request


def test_request_that_json_cannot_say_is_our_bug() -> None:
    with pytest.raises(ValueError, match="JSON"):
        parameters_text({**REQUEST, "extra": float("nan")})


# --- AUTOMATIC1111 --------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("negative", ["", "blurry, bad", 'two\nlines "q": 1'])
def test_automatic1111_reads_it(prompt: str, negative: str) -> None:
    request = {**REQUEST, "prompt": prompt, "negative_prompt": negative}
    read = a1111_reads(parameters_text(request))
    assert read["Prompt"] == prompt and read["Negative prompt"] == negative
    assert json.loads(read["ipa_request"]) == request
    del read["Prompt"], read["Negative prompt"], read["ipa_request"]
    assert read == {
        "Steps": "25",
        "Sampler": "DDIM",
        "Schedule type": "Automatic",
        "CFG scale": "7.5",
        "Seed": "0",
        "Size": "768x512",
        "IP-Adapter scale": "0.6",
        "RNG": "CPU",
        "Version": "ipa-runtime 0.1.0",
    }


def test_text_as_written() -> None:
    request = {
        **REQUEST,
        "negative_prompt": "blurry",
        "guidance_scale": 7.0,
        "ip_adapter_scale": 1,
        "scheduler": "pndm",
    }
    first, second, third = parameters_text(request).split("\n")
    assert (first, second) == ("a red circle", "Negative prompt: blurry")
    assert third.startswith(
        "Steps: 25, Sampler: PLMS, Schedule type: Automatic, CFG scale: 7, Seed: 0, Size: 768x512, "
        'IP-Adapter scale: 1, RNG: CPU, Version: ipa-runtime 0.1.0, ipa_request: "{\\"prompt\\"'
    )


@pytest.mark.parametrize(
    ("scheduler", "sampler", "schedule_type"),
    [
        ("ddim", "DDIM", "Automatic"),
        ("pndm", "PLMS", "Automatic"),
        ("euler", "Euler", "Automatic"),
        ("euler-ancestral", "Euler a", "Automatic"),
        ("dpm++-2m", "DPM++ 2M", "Uniform"),
        ("dpm++-2m-karras", "DPM++ 2M", "Karras"),
        ("unipc", "UniPC", "Automatic"),
        ("lcm", "LCM", "Automatic"),
        ("ddpm", "DDPM", "Automatic"),
    ],
)
def test_schedulers_have_automatic1111s_names(scheduler: str, sampler: str, schedule_type: str) -> None:
    read = a1111_reads(parameters_text({**REQUEST, "scheduler": scheduler}))
    assert (read["Sampler"], read["Schedule type"]) == (sampler, schedule_type)


def test_every_scheduler_has_a_name_there() -> None:
    for scheduler in SCHEDULER_NAMES:
        assert "Sampler" in a1111_reads(parameters_text({**REQUEST, "scheduler": scheduler}))


def test_position_in_a_batch_is_named() -> None:
    read = a1111_reads(parameters_text({**REQUEST, "num_images": 4, "only": 2}))
    assert (read["Batch size"], read["Batch pos"]) == ("4", "2")


def test_the_bundles_own_scheduler_has_no_name() -> None:
    assert "Sampler" not in a1111_reads(parameters_text({**REQUEST, "scheduler": None}))


def test_pillow_reads_the_same_text(tmp_path: Path) -> None:
    for prompt in ("plain", "猫"):
        request = {**REQUEST, "prompt": prompt}
        with Image.open(save(tmp_path, pnginfo(request))) as image:
            assert image.info["parameters"] == parameters_text(request)


# --- what is refused ------------------------------------------------------------------------------


def text_info(text: str) -> PngInfo:
    info = PngInfo()
    info.add_text("parameters", text)
    return info


def test_missing_metadata(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no request"):
        read_request(save(tmp_path, None))


def test_metadata_of_another_program(tmp_path: Path) -> None:
    foreign = "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Version: v1.10.1"
    with pytest.raises(RequestError, match="another program"):
        read_request(save(tmp_path, text_info(foreign)))


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ('"{\\"prompt\\": ', "damaged"),
        ('"not json"', "damaged"),
        ('"[1, 2]"', "no JSON object"),
        ('"' + "[" * 100_000 + '"', "damaged"),
        ('"{\\"seed\\": ' + "9" * 5000 + '}"', "damaged"),
        ('"' + "\\\\" * 100, "damaged"),
    ],
)
def test_damaged_request(tmp_path: Path, value: str, match: str) -> None:
    text = f"a cat\nSteps: 20, Sampler: DDIM, Seed: 1, ipa_request: {value}"
    with pytest.raises(RequestError, match=match):
        read_request(save(tmp_path, text_info(text)))


def test_too_large_metadata_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="at most 1048576"):
        read_request(save(tmp_path, text_info("x" * 2**20)))


def test_other_text_is_skipped_unread(tmp_path: Path) -> None:
    info = pnginfo(REQUEST)
    path = save(tmp_path, info)
    content = path.read_bytes()
    data = b"Comment\0" + b"x" * 20_000_000
    chunk = struct.pack(">I", len(data)) + b"tEXt" + data + struct.pack(">I", zlib.crc32(b"tEXt" + data))
    path.write_bytes(content[:33] + chunk + content[33:])
    assert read_request(path) == REQUEST


def test_endless_chunks_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, None)
    content = path.read_bytes()
    path.write_bytes(content[:33] + (struct.pack(">I", 0) + b"tEXt" + struct.pack(">I", 0)) * 200_000)
    with pytest.raises(RequestError, match="more than 100000 chunks"):
        read_request(path)


def test_what_is_no_png_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    with pytest.raises(RequestError, match="No such file"):
        read_request(path)
    with pytest.raises(RequestError, match="directory"):
        read_request(tmp_path)
    for content in (b"", b"hello", b"\x89PNG\r\n\x1a\n\0"):
        path.write_bytes(content)
        with pytest.raises(RequestError, match="give a PNG that ipa-run wrote"):
            read_request(path)
    Image.new("RGB", (8, 8)).save(path, format="JPEG")
    with pytest.raises(RequestError, match="not a PNG file"):
        read_request(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = save(tmp_path, pnginfo(REQUEST)).read_bytes()
    path = tmp_path / "cut.png"
    end_of_text = content.index(b"IDAT") - 4
    for length in range(0, end_of_text, 7):
        path.write_bytes(content[:length])
        with pytest.raises(RequestError):
            read_request(path)


@pytest.mark.parametrize(
    "request_",
    [
        Request("a cat", init_image="a.png", strength=0.5),
        Request("a cat", init_image="a.png", mask_image="m.png", strength=1.0),
        Request("a cat", controls=(ControlImage("e.png", "edges", 0.5),), guess_mode=True),
    ],
)
def test_fields_that_need_a_picture_are_recorded_with_it(request_: Request) -> None:
    record = json.loads(json.dumps(request_record(request_)))
    controls = ControlImage.from_records(record.pop("controls"))
    assert Request(**{**record, "image_prompts": (), "controls": controls}) == request_
