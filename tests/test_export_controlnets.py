"""`ipa-export` and ControlNets: export, inspect, validate, engines, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import made_once
from tiny import tiny_controlnet
from tiny_xl import WIDTHS

from ipa.engines.bundle import Bundle
from ipa.engines.manifest import FILE_NAME, Manifest
from ipa.engines.onnxruntime_cuda_engine import OnnxRuntimeCudaEngine
from ipa.engines.plan_cache import PlanCache
from ipa.engines.shape_profile import ShapeProfile
from ipa.engines.spec import residuals_of
from ipa.export.cases import cases
from ipa.export.cli import main
from ipa.export.controlnets import ControlNetSource
from ipa.export.engine_builds import EngineBuilds
from ipa.export.validate import Validator


def call(*arguments: object) -> Any:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.fixture(scope="module")
def half_bundle(session_folder: Path, tiny_base: Path, tiny_controlnets: dict[str, Path]) -> Path:
    """In FP16, by the command: one ControlNet is named, the other has its folder's name."""

    def make(output: Path) -> None:
        controlnets = "--controlnet", f"edges={tiny_controlnets['edges']}", "--controlnet", tiny_controlnets["mood"]
        result = call("onnx", "--base", tiny_base, "--output", output, "--dtype", "fp16", *controlnets)
        assert result.exit_code == 0, result.output
        assert result.stdout.endswith("adapters: none, ControlNets: edges, controlnet_mood\n")

    return made_once(session_folder, "tiny_control_half_bundle", make)


def test_inspect_shows_them(half_bundle: Path, tiny_controlnets: dict[str, Path]) -> None:
    text = call("inspect", half_bundle).stdout
    assert "controlnet/edges  float16" in text
    assert "<- controlnet_cond float16(batch, 3, height, width)" in text
    assert "-> down_block_res_3 float16(batch, 24, latent_height_1, latent_width_1)" in text
    assert "    made of controlnet_edges\n" in text
    assert "    made of controlnet_mood, global: for the positive half alone\n" in text
    assert str(tiny_controlnets["edges"].parent) not in (half_bundle / FILE_NAME).read_text(), "no path of this machine"


def test_residuals_follow_the_blocks_of_an_sdxl_unet(tiny_xl_bundle: Path) -> None:
    """Three levels: one residual of the first convolution, two of each block and one of each way down, the middle."""
    manifest = Bundle.open(tiny_xl_bundle, verify=False).manifest
    added = ["text_embeds", "time_ids", "controlnet_cond"]
    for name, control in manifest.controlnets.items():
        spec, text = control.component.spec, [] if name == "pose" else ["encoder_hidden_states"]
        assert [tensor.name for tensor in spec.inputs] == ["sample", "timestep", *text, *added]
        assert spec.outputs == residuals_of(manifest.components["unet"].spec)
        found = [(tensor.axes[1], tensor.axes[2]) for tensor in spec.outputs]
        heights = ("latent_height", "latent_height_1", "latent_height_2")
        one, two, three = zip(WIDTHS, heights, strict=True)
        down = (WIDTHS[0], heights[1]), (WIDTHS[1], heights[2])
        assert found == [one, one, one, down[0], two, two, down[1], three, three, three]


def validate(bundle: Path, base: Path, controlnets: dict[str, Path]) -> Any:
    given = (part for name, folder in controlnets.items() for part in ("--controlnet", f"{name}={folder}"))
    return call("validate", "--bundle", bundle, "--base", base, *given)


def test_a_faithful_bundle_passes(
    half_bundle: Path, tiny_base: Path, tiny_controlnets: dict[str, Path], tmp_path: Path
) -> None:
    """In FP16, against diffusers in FP32."""
    bundle = Path(shutil.copytree(half_bundle, tmp_path / "bundle"))
    named = {"edges": tiny_controlnets["edges"], "controlnet_mood": tiny_controlnets["mood"]}
    result = validate(bundle, tiny_base, named)
    assert result.exit_code == 0, result.output
    print(result.stdout)
    names = {check["name"] for check in Bundle.open(bundle).manifest.validation["checks"]}
    for name in named:
        step = f"step, controlnet/{name}"
        assert {f"controlnet/{name}", step, f"{step}, moves with scale"} <= names
    assert (
        "no ControlNet 'pose' (it has: controlnet_mood, edges)"
        in validate(bundle, tiny_base, {"pose": named["edges"]}).stderr
    )


def test_another_controlnet_fails(
    tiny_control_bundle: Path, tiny_base: Path, tiny_controlnets: dict[str, Path]
) -> None:
    given = [
        ControlNetSource("edges", str(tiny_controlnets["pose"])),
        ControlNetSource("pose", str(tiny_controlnets["pose"])),
    ]
    checks = Validator(tiny_control_bundle, str(tiny_base), None, (), controlnets=given).run()
    edges, pose = islice((check for check in checks if check.name.startswith("controlnet/")), 2)
    assert (edges.name, edges.passed) == ("controlnet/edges", False)
    assert (pose.name, pose.passed) == ("controlnet/pose", True)


def test_old_bundles_open(tiny_bundle: Path) -> None:
    """Those that were written before there were ControlNets."""
    record = json.loads((tiny_bundle / FILE_NAME).read_text())
    assert record.pop("controlnets") == {}
    assert Manifest.from_json(json.dumps(record)).controlnets == {}


def test_a_damaged_controlnet_is_found(tiny_control_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_control_bundle, tmp_path / "bundle"))
    file = bundle / "controlnet" / "pose" / "model.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "controlnet/pose/model.onnx" in call("inspect", bundle).stderr


def test_the_cuda_engine_knows_the_outputs(tiny_control_bundle: Path) -> None:
    """So it can capture a CUDA graph: the sizes of the levels follow from the latents."""
    bundle = Bundle.open(tiny_control_bundle, verify=False)
    with (
        OnnxRuntimeCudaEngine(bundle.graph("controlnet/edges"), "cpu") as found,
        bundle.open_component("controlnet/edges", "onnxruntime") as expected,
    ):
        for _, inputs in cases(expected.spec, 8, 1, [(1, 4, 9, 13), (2, 4, 8, 8)]):
            ours, theirs = found(**inputs), expected(**inputs)
            for name, array in theirs.items():
                np.testing.assert_allclose(ours[name], array, rtol=1e-4, atol=1e-4)
        assert all(buffers.outputs for buffers in found._buffers.values())


def test_engines_are_built(half_bundle: Path, tmp_path: Path) -> None:
    """With TensorRT-RTX, which parses and builds without a GPU."""
    bundle = Bundle.open(half_bundle, verify=False)
    profile = ShapeProfile.parse(["128x128", "64x192"], "1:1:2", "4")
    builds = EngineBuilds(bundle, PlanCache(tmp_path / "cache"), "tensorrt-rtx", profile, ("8.6",))
    _, jobs = builds.survey()
    wanted = [job for job in jobs if job.component in ("unet", "controlnet/edges")]
    assert len(wanted) == 2
    outcomes = {outcome.component: outcome.header for outcome in builds.run(wanted)}
    assert outcomes["controlnet/edges"].tensors["mid_block_res"].startswith("float16")
    assert "down_block_res_11" in outcomes["unet"].tensors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cross_attention_dim": 64}, "is for text of width 64, this base model has 48"),
        ({"in_channels": 8}, "is for latents of channels 8, this base model has 4"),
        ({"block_out_channels": (24, 48, 72, 72)}, "blocks of channels 24/48/72/72, this base model has 24/48/72/96"),
        ({"layers_per_block": 1}, "blocks of layers 1/1/1/1, this base model has 2/2/2/2"),
        ({"conditioning_channels": 1}, "control images of channels 1, this base model has 3"),
        ({"conditioning_embedding_out_channels": (8, 16)}, "pixels per latent 2, this base model has 8"),
        (
            {"addition_embed_type": "text", "encoder_hid_dim": 48},
            r"uses addition_embed_type \(text\), which this base model does not have",
        ),
    ],
)
def test_a_controlnet_for_another_model_is_refused(
    tiny_base: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = tiny_controlnet(tiny_base, tmp_path / "other", **config)
    assert re.search(message, refusal(tiny_base, tmp_path, "--controlnet", folder))


@pytest.mark.parametrize(
    ("of_controlnet", "of_base", "message"),
    [
        ("sd15", "sdxl", r"for Stable Diffusion 1.x or 2.x \(text of width 48\), this base model is .* XL \(64\); use"),
        ("sdxl", "sd15", r"for Stable Diffusion XL \(text of width 64\), this base model is .* 1.x \(48\); use a Con"),
    ],
)
def test_a_controlnet_for_another_family_is_refused_with_both_sides(
    request: pytest.FixtureRequest, tmp_path: Path, of_controlnet: str, of_base: str, message: str
) -> None:
    prefix = {"sd15": "tiny", "sdxl": "tiny_xl"}
    folder = request.getfixturevalue(f"{prefix[of_controlnet]}_controlnets")["edges"]
    base = request.getfixturevalue(f"{prefix[of_base]}_base")
    assert re.search(message, refusal(base, tmp_path, "--controlnet", folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"projection_class_embeddings_input_dim": 80},
            "is for numbers beside the timestep 80, this base model has 84",
        ),
        ({"addition_time_embed_dim": 6}, "is for numbers made of a size 6, this base model has 8"),
    ],
)
def test_an_sdxl_controlnet_of_other_sizes_is_refused(
    tiny_xl_base: Path, tmp_path: Path, config: dict[str, int], message: str
) -> None:
    folder = tiny_controlnet(tiny_xl_base, tmp_path / "other", **config)
    assert re.search(message, refusal(tiny_xl_base, tmp_path, "--controlnet", folder))


def refusal(base: Path, folder: Path, *options: object) -> str:
    """The one line in which an export is refused; nothing is written into `folder`."""
    result = call("onnx", "--base", base, "--output", folder / "b", *options)
    assert result.exit_code == 2, result.output
    assert not (folder / "b").exists()
    (line,) = result.stderr.splitlines()
    return str(line)


Folders = Callable[[Path], list[object]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda edges: [edges.parent / "missing"], "neither a folder nor a Hub id"),
        (lambda edges: [edges.parent / "tiny_base" / "unet"], "is a UNet2DConditionModel; --controlnet takes"),
        (lambda edges: [edges.parent / "tiny_base"], "has no config.json; --controlnet takes a ControlNetModel"),
        (lambda edges: [f"a={edges}", f"a={edges}"], "two ControlNets have the same name"),
        (lambda edges: [f"a b={edges}"], "may hold only letters"),
    ],
)
def test_what_is_no_controlnet_is_refused(
    tiny_base: Path, tiny_controlnets: dict[str, Path], tmp_path: Path, arguments: Folders, message: str
) -> None:
    given = [part for text in arguments(tiny_controlnets["edges"]) for part in ("--controlnet", text)]
    assert re.search(message, refusal(tiny_base, tmp_path, *given))


def test_a_malformed_configuration_is_one_message(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "ControlNetModel", "block_out_channels": null}')
    assert "config.json is no configuration" in refusal(tiny_base, tmp_path, "--controlnet", f"x={tmp_path}")


def test_a_merged_graph_has_no_room(
    tiny_base: Path, tiny_adapter_file: Path, tiny_controlnets: dict[str, Path], tmp_path: Path
) -> None:
    options = "--adapter", tiny_adapter_file, "--merged", tmp_path / "m.onnx", "--controlnet", tiny_controlnets["edges"]
    assert "no room for ControlNets" in refusal(tiny_base, tmp_path, *options)


def test_names() -> None:
    parse = ControlNetSource.parse
    assert parse("canny=lllyasviel/control_v11p_sd15_canny") == ControlNetSource(
        "canny", "lllyasviel/control_v11p_sd15_canny"
    )
    assert parse("lllyasviel/control_v11p_sd15_canny").name == "control_v11p_sd15_canny"
    assert parse("models/a=b/depth/") == ControlNetSource("depth", "models/a=b/depth/")
