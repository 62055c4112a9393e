"""The image options of `ipa-run` become fields of a request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ipa.engines.errors import RequestError
from ipa.runtime.image_options import OPTIONS, image_options
from ipa.runtime.image_prompt import ImagePrompt
from ipa.runtime.prompt_fields import laid_over, request_fields


def fields(**given: list[str]) -> dict[str, Any]:
    assert set(given) <= set(OPTIONS)
    return request_fields(image_options({option: given.get(option, []) for option in OPTIONS}))


def test_one_image_is_a_simple_request() -> None:
    assert fields() == {}
    assert fields(adapter=["a"]) == {"adapter": "a"}
    assert fields(image=["cat.png"], adapter=["a=0.5"]) == {"image": "cat.png", "adapter": "a", "ip_adapter_scale": 0.5}
    assert fields(image=["a=cat.png"], adapter=["a"]) == {"image": "cat.png", "adapter": "a"}
    assert fields(ip_adapter_scale=["0"]) == {"ip_adapter_scale": 0.0}
    assert fields(ip_adapter_scale=["style+layout"]) == {"ip_adapter_scale": "style+layout"}
    assert fields(ip_adapter_scale=['{"mid": 1}']) == {"ip_adapter_scale": {"mid": 1}}


def test_a_file_may_have_an_equals_sign_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x=1.png").touch()
    assert fields(image=["x=1.png"]) == {"image": "x=1.png"}
    assert fields(image=["./y=1.png"]) == {"image": "./y=1.png"}, "no name of an adapter"


def test_several_images_share_an_adapter() -> None:
    assert fields(image=["1.png", "2.png"]) == {"image_prompts": (ImagePrompt(("1.png", "2.png")),)}


def test_several_adapters_have_their_own_options() -> None:
    found = fields(
        adapter=["a=0.8", "b"],
        image=["a=1.png", "b=3.png", "a=2.png"],
        ip_adapter_scale=["b=0.25"],
        ip_adapter_mask=["b=mask.png"],
        ip_adapter_start=["a=0.1"],
        ip_adapter_end=["b=0.5"],
    )
    first = ImagePrompt(("1.png", "2.png"), "a", 0.8, start=0.1)
    second = ImagePrompt(("3.png",), "b", 0.25, masks=("mask.png",), end=0.5)
    assert found == {"image_prompts": (first, second)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adapter": ["a", "b"], "image": ["cat.png"]}, r"--image cat.png: which adapter .* one of a, b"),
        ({"adapter": ["a", "a"]}, "same adapter twice"),
        ({"adapter": ["a", "b"], "image": ["a=cat.png"]}, r"no image of adapter 'b': add --image b=FILE"),
        ({"adapter": ["a=0.5"], "ip_adapter_scale": ["1"], "image": ["x"]}, r"--ip-adapter-scale is given 2 times"),
        ({"image": ["x"], "ip_adapter_scale": ["loud"]}, "neither a number nor one of style"),
        ({"image": ["x"], "ip_adapter_scale": ["{"]}, "neither a number"),
        ({"image": ["x"], "ip_adapter_scale": ["inf"]}, "finite"),
        ({"image": ["x"], "ip_adapter_start": ["early"]}, "'early', expected a number"),
        ({"ip_adapter_mask": ["m.png"]}, "no image"),
        ({"image": ["face=m.png"]}, r"--image face=m.png: no adapter 'face' is named; add --adapter face, or leave"),
        ({"image": [f"face={'m' * 5000}"]}, "no adapter 'face' is named"),
        ({"adapter": ["a"], "image": ["b=m.png"]}, r"--image b=m.png: no adapter 'b' is named; add --adapter b"),
    ],
)
def test_bad_options(given: dict[str, list[str]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        fields(**given)


def test_a_prompt_survives_its_record() -> None:
    prompt = ImagePrompt(("1.png",), "a", {"mid": 0.5}, masks=("m.png",), start=0.25)
    assert ImagePrompt.from_record(json.loads(json.dumps(prompt.record()))) == prompt


IN = {"images": ("1.png",)}


@pytest.mark.parametrize(
    ("base", "over", "expected"),
    [
        (
            [{**IN, "scale": 0.3, "end": 0.5}],
            [{"images": ("2.png",)}],
            [{"images": ("2.png",), "scale": 0.3, "end": 0.5}],
        ),
        ([{**IN, "adapter": "a", "scale": 0.3}], [{"adapter": "b"}], [{**IN, "adapter": "b", "scale": 0.3}]),
        ([{**IN, "scale": 0.3}], [{"end": 0.5}], [{**IN, "scale": 0.3, "end": 0.5}]),
        ([{"embeds": "e", "scale": 0.3}], [IN], [{**IN, "scale": 0.3}]),
        ([{**IN, "masks": ("m.png",)}], [{"embeds": "e"}], [{"embeds": "e", "masks": ("m.png",)}]),
        (
            [{**IN, "adapter": "a", "scale": 0.3}, {**IN, "adapter": "b", "end": 0.5}],
            [{"adapter": "b", "scale": 0.7}],
            [{**IN, "adapter": "a", "scale": 0.3}, {**IN, "adapter": "b", "end": 0.5, "scale": 0.7}],
        ),
        (
            [{**IN, "adapter": "a", "scale": 0.3}],
            [{"adapter": "b", "images": ("2.png",)}, {"adapter": "a", "end": 0.5}],
            [{"adapter": "b", "images": ("2.png",)}, {**IN, "adapter": "a", "scale": 0.3, "end": 0.5}],
        ),
        ([], [IN], [IN]),
        ([IN, IN], [], [IN, IN]),
    ],
)
def test_what_is_named_goes_over_what_was_there(base: list[Any], over: list[Any], expected: list[Any]) -> None:
    assert laid_over(base, over) == expected


@pytest.mark.parametrize("over", [{"images": ("2.png",)}, {"adapter": "c"}])
def test_one_of_several_image_prompts_has_to_be_named(over: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="say which one changes by --adapter NAME, with NAME one of a, b"):
        laid_over([{**IN, "adapter": "a"}, {**IN, "adapter": "b"}], [over])


@pytest.mark.parametrize("record", ["x", {}, {"images": "x"}, {"images": ["x"], "colour": 1}, {"images": [1]}])
def test_damaged_records(record: object) -> None:
    with pytest.raises(RequestError):
        ImagePrompt.from_record(record)
