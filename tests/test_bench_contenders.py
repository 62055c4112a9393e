"""The contenders do the same work: a block is so many calls of the UNet, of the same batch, in every task."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ipa.benchmarks import rates, speed
from ipa.benchmarks.contender import TASKS, Setting
from ipa.benchmarks.models import Models
from ipa.benchmarks.our_contenders import OurPipeline
from ipa.benchmarks.speed_options import SpeedOptions
from ipa.benchmarks.torch_contenders import TorchPipeline
from ipa.runtime.demo import demo_bundle

BLOCK_STEPS = 2


def setting_of(task: str, **fields: Any) -> Setting:
    usual = {"images": 1, "height": 64, "width": 72, "steps": 5, "block_steps": BLOCK_STEPS, "scheduler": "ddim"}
    return Setting(task=task, **{**usual, "guidance_scale": 4.0, **fields})


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_block_is_so_many_steps(
    task: str,
    tiny_base: Path,
    tiny_adapter_file: Path,
    tiny_bundle: Path,
    tiny_control_bundle: Path,
    tiny_controlnets: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    control = next(iter(tiny_controlnets)) if task == "controlnet" else None
    folder = None if control is None else str(tiny_controlnets[control])
    bundle = tiny_bundle if control is None else tiny_control_bundle
    setting = setting_of(task, images=2, control=control)
    batches: dict[str, list[int]] = {"theirs": [], "ours": []}

    theirs = TorchPipeline(str(tiny_base), str(tiny_adapter_file), asdict(setting), controlnet=folder)
    hook = lambda module, given, kwargs: batches["theirs"].append(len(given[0]))  # noqa: E731
    theirs._theirs.pipe.unet.register_forward_pre_hook(hook, with_kwargs=True)
    seconds, device_seconds = theirs.block()
    assert seconds > 0 and device_seconds is None

    ours = OurPipeline(str(bundle), "onnxruntime", asdict(setting))
    unet = ours._pipe.component("unet")
    call = type(unet).__call__

    def counted(engine: Any, **inputs: Any) -> Any:
        if engine.component == "unet":
            batches["ours"].append(len(inputs["sample"]))
        return call(engine, **inputs)

    monkeypatch.setattr(type(unet), "__call__", counted)
    assert ours.block()[0] > 0

    assert batches == {"theirs": [4] * BLOCK_STEPS, "ours": [4] * BLOCK_STEPS}
    assert setting.unet_batch == 4
    own = {"adapter"}  # in diffusers it is a part of the step
    assert set(ours.stages) - own == set(theirs.stages)
    assert ("vae_encoder" in ours.stages) == (task in ("img2img", "inpaint"))
    for stage in (*ours.stages.values(), *theirs.stages.values()):
        stage()


def test_without_guidance_the_batch_has_one_half() -> None:
    assert setting_of("variation", images=3, guidance_scale=1.0).unet_batch == 3


def test_the_picture_is_random_and_the_same_everywhere() -> None:
    first, second = (setting_of("img2img").request() for _ in range(2))
    assert np.array_equal(np.asarray(first.image), np.asarray(second.image))
    assert np.asarray(first.image).std() > 10
    assert not np.array_equal(np.asarray(first.image), np.asarray(first.init_image))


def test_a_contender_without_image_prompt(tiny_base: Path, tiny_bundle: Path) -> None:
    setting = asdict(setting_of("variation", has_image=False))
    for contender in (
        TorchPipeline(str(tiny_base), None, setting),
        OurPipeline(str(tiny_bundle), "onnxruntime", setting),
    ):
        assert contender.block()[0] > 0
        assert "image" not in contender.stages


def test_from_an_image_fewer_steps_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strength of 0.8 leaves out a fifth of the steps: seconds are divided by those that ran."""
    options = SpeedOptions("demo", tmp_path, tmp_path, task="img2img", names=("onnxruntime",), steps=10, pairs=2)
    monkeypatch.setattr(rates, "measured", lambda device: {})
    monkeypatch.setattr(speed, "demo", lambda folder: Models("demo", "the demo model", demo_bundle()))
    record = speed.measure_speed(replace(options, start_up=False)).record
    (ours,) = record.contenders
    assert (record.setting["steps"], record.setting["unet_calls"], record.setting["block_steps"]) == (10, 8, 8)
    around = sum(ours.stage_seconds.values())
    assert ours.seconds_per_image == pytest.approx(8 * ours.step_seconds.value + around)
