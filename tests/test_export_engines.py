"""`ipa-export build-engines` with TensorRT-RTX, which parses and builds without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from build_calls import OPTIONS, build, change_graph, reasons, use_unknown_operator
from click.testing import CliRunner

from ipa.engines.bundle import Bundle
from ipa.engines.plan_cache import PlanCache
from ipa.engines.shape_profile import ShapeProfile
from ipa.engines.spec import ImageSlots
from ipa.export.build import ExportRequest, export_bundle
from ipa.export.cli import main
from ipa.export.engine_builds import EngineBuilds


@pytest.fixture(scope="module")
def built(tiny_half_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle of its own and the cache with its engines. Copy the cache before changing it."""
    folder = tmp_path_factory.mktemp("engines")
    bundle = Path(shutil.copytree(tiny_half_bundle, folder / "bundle"))
    result = build(bundle, folder / "cache", "--compute-capability", "8.6,8.9")
    assert result.exit_code == 0, result.output
    assert set(reasons(result.stdout).values()) == {"built: not built yet"}
    return bundle, folder / "cache"


def again(built: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same bundle, and a cache that may be changed."""
    bundle, cache = built
    return bundle, Path(shutil.copytree(cache, tmp_path / "cache"))


def test_every_engine_has_the_tensors_of_the_spec_table(built: tuple[Path, Path]) -> None:
    bundle, cache = built
    manifest = Bundle.open(bundle, verify=False).manifest
    headers = {header.key.component: header for _, header in PlanCache(cache).headers()}
    assert set(headers) == {*manifest.components, "ip_adapter/tiny"}
    for component, header in headers.items():
        record = manifest.components.get(component) or manifest.adapters["tiny"].component
        tensors = (*record.spec.inputs, *record.spec.outputs)
        assert list(header.tensors) == sorted(tensor.name for tensor in tensors)
        for tensor in tensors:
            assert header.tensors[tensor.name].startswith(f"{tensor.dtype} ")
        assert (header.key.precision, header.key.target) == ("float16", "8.6,8.9")
        assert header.peak_mib > 10
    kv = manifest.kv_layout.size
    unet = headers["unet"].tensors
    assert unet["sample"] == "float16 1x4x16x8:2x4x16x16:4x4x24x16"
    assert unet["image_kv"] == f"float16 1x1x{kv}:2x4x{kv}:4x16x{kv}"
    assert unet["noise_pred"] == "float16 ?x4x?x?"


def test_a_second_run_builds_nothing(built: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, cache = built
    monkeypatch.setattr(subprocess, "Popen", None)
    result = build(bundle, cache, "--compute-capability", "8.6,8.9")
    assert result.exit_code == 0, result.output
    assert set(reasons(result.stdout).values()) == {"kept: nothing has changed"}
    assert "0 built, 7 kept" in result.stdout


def test_an_added_adapter_builds_its_own_engine_alone(
    built: tuple[Path, Path], tiny_adapter_file: Path, tmp_path: Path
) -> None:
    source, cache = again(built, tmp_path)
    bundle = Path(shutil.copytree(source, tmp_path / "bundle"))
    added = ["adapter", "--bundle", str(bundle), "--adapter", f"second={tiny_adapter_file}"]
    assert CliRunner().invoke(main, added).exit_code == 0
    found = reasons(build(bundle, cache, "--compute-capability", "8.6,8.9").stdout)
    assert found.pop("ip_adapter/second") == "built: not built yet"
    assert set(found.values()) == {"kept: nothing has changed"}


@pytest.mark.parametrize(
    ("precision", "folder"), [("float32", "tiny_kinds_bundle"), ("float16", "tiny_kinds_half_bundle")]
)
def test_adapters_of_every_kind_build(
    precision: str, folder: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bundle = Bundle.open(request.getfixturevalue(folder), verify=False)
    profile = ShapeProfile.parse(["128x128"], "1:1:2", "16:16:257")
    builds = EngineBuilds(bundle, PlanCache(tmp_path / "cache"), "tensorrt-rtx", profile, ("8.6",))
    _, jobs = builds.survey()
    adapters = [job for job in jobs if job.component.startswith("ip_adapter/")]
    tensors = {outcome.component: outcome.header.tensors for outcome in builds.run(adapters)}
    kv = bundle.manifest.kv_layout.size
    hidden_states = f"{precision} 1x37x32:2x37x32:4x37x32"
    assert tensors == {
        "ip_adapter/tiny": {"image_embeds": f"{precision} 1x40:2x40:4x40", "image_kv": f"{precision} ?x4x{kv}"},
        "ip_adapter/plus": {"hidden_states": hidden_states, "image_kv": f"{precision} ?x16x{kv}"},
        "ip_adapter/full-face": {"hidden_states": hidden_states, "image_kv": f"{precision} ?x37x{kv}"},
    }
    unet = builds.key("unet", bundle.manifest.components["unet"])
    assert f"image_kv 1x1x{kv}:2x16x{kv}:4x257x{kv}" in unet.profile


def test_changed_profile_and_target_are_the_reason(built: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, cache = again(built, tmp_path)
    found = reasons(build(bundle, cache, options=(*OPTIONS[:-1], "4:4:32")).stdout)
    assert found["unet"].startswith("built: target was 8.6,8.9, is 8.0 and later; profile was image_kv")
    assert found["text_kv"] == "built: target was 8.6,8.9, is 8.0 and later"


def test_changed_weights_are_the_reason(built: tuple[Path, Path], tmp_path: Path) -> None:
    source, cache = again(built, tmp_path)
    bundle = Path(shutil.copytree(source, tmp_path / "bundle"))
    for path, header in PlanCache(cache).headers():  # as if the plans were this bundle's
        with PlanCache(cache).workspace() as folder:
            (folder / "plan").write_bytes(path.read_bytes()[-header.size :])
            PlanCache(cache).store(header.key, folder / "plan", bundle, header.tensors, 1, 1)
    change_graph(bundle, "text_kv", lambda model: model.metadata_props.add(key="changed", value="yes"))
    found = reasons(build(bundle, cache, "--compute-capability", "8.6,8.9").stdout)
    assert re.fullmatch(r"built: weights was [0-9a-f]{12}\.\.\., is [0-9a-f]{12}\.\.\.", found.pop("text_kv"))
    assert set(found.values()) == {"kept: nothing has changed"}


def test_a_damaged_plan_is_built_again(built: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, cache = again(built, tmp_path)
    (path,) = (path for path, header in PlanCache(cache).headers() if header.key.component == "text_kv")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = reasons(build(bundle, cache, "--compute-capability", "8.6,8.9").stdout)
    assert found["text_kv"].startswith(f"built: {path.name} is refused: the plan in it is damaged")
    assert found["unet"] == "kept: nothing has changed"


def use_attention_of_opset_23(model: onnx.ModelProto) -> None:
    """TensorRT-RTX 1.7.1 parses this and crashes when it builds it where no GPU is."""
    text, output = model.graph.input[0], model.graph.output[0]
    sizes = [value.type.tensor_type.shape.dim[2].dim_value for value in (text, output)]
    attention = onnx.helper.make_node("Attention", [text.name] * 3, ["attended"], q_num_heads=4, kv_num_heads=4)
    copies = ["attended"] * (sizes[1] // sizes[0])
    nodes = [attention, onnx.helper.make_node("Concat", copies, [output.name], axis=-1)]
    graph = onnx.helper.make_graph(nodes, "attention", [text], [output])
    model.CopyFrom(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (use_attention_of_opset_23, "crashed while it built (Segmentation fault)"),
        (use_unknown_operator, "the parser refused the graph"),
    ],
)
def test_a_builder_that_fails_is_one_line_and_leaves_nothing(
    built: tuple[Path, Path], tmp_path: Path, change: Any, message: str
) -> None:
    source, cache = again(built, tmp_path)
    bundle = Path(shutil.copytree(source, tmp_path / "bundle"))
    change_graph(bundle, "text_kv", change)
    before = sorted(path.name for path in cache.iterdir())
    result = build(bundle, cache, "--compute-capability", "8.6,8.9")
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("ipa-export:")]
    assert "text_kv: tensorrt-rtx" in line
    assert message in line
    assert sorted(path.name for path in cache.iterdir()) == before


def test_a_changed_byte_is_found_before_the_build(built: tuple[Path, Path], tmp_path: Path) -> None:
    source, cache = again(built, tmp_path)
    bundle = Path(shutil.copytree(source, tmp_path / "bundle"))
    path = bundle / "text_kv" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = build(bundle, cache, "--force")
    assert result.exit_code == 2
    assert "is damaged: sha256" in result.stderr


def test_two_builds_at_once(built: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, cache = again(built, tmp_path)
    for path, header in PlanCache(cache).headers():
        if header.key.component in ("text_kv", "vae_decoder"):
            path.unlink()
    command = [Path(sys.executable).with_name("ipa-export"), "build-engines", "--bundle", bundle]
    command += ["--cache", cache, "--engine", "tensorrt-rtx", *OPTIONS, "--compute-capability", "8.6,8.9"]
    processes = [subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate()[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all("2 built, 5 kept" in output for output in outputs), "they started together"
    assert "0 built, 7 kept" in build(bundle, cache, "--compute-capability", "8.6,8.9").stdout


def test_a_unet_with_slots_and_masks_builds(tiny_base: Path, tmp_path: Path) -> None:
    slots = ImageSlots(2, True)
    export_bundle(ExportRequest(str(tiny_base), tmp_path / "bundle", dtype="float16", slots=slots))
    bundle = Bundle.open(tmp_path / "bundle", verify=False)
    profile = ShapeProfile.parse(["128x128", "64x192"], "1:1:2", "4:4:16")
    builds = EngineBuilds(bundle, PlanCache(tmp_path / "cache"), "tensorrt-rtx", profile, ("8.6",))
    _, missing = builds.survey()
    builds.run([job for job in missing if job.component == "unet"], 1, lambda component, done: None)
    ((_, header),) = PlanCache(tmp_path / "cache").headers()
    kv = bundle.manifest.kv_layout.size
    assert header.tensors["image_kv_1"] == f"float16 1x1x{kv}:2x4x{kv}:4x16x{kv}"
    # 16 x 8, 16 x 16 and 24 x 16 latents; half of both on the next level.
    assert header.tensors["image_mask_0"] == "float16 1x2x128:2x2x256:4x2x384"
    assert header.tensors["image_mask_1"] == "float16 1x2x32:2x2x64:4x2x96"
