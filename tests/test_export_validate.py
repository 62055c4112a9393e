"""`ipa-export validate` passes a faithful bundle, names what is wrong in another, and `--dtype fp16` and `--merged`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from diffusers import UNet2DConditionModel
from onnx import numpy_helper
from oracle import diffusers_noise, diffusers_unet
from tiny import EMBED_WIDTH, TEXT_WIDTH

from ipa.engines.bundle import Bundle, hash_file
from ipa.engines.manifest import FILE_NAME, ComponentRecord, FileRecord, Manifest
from ipa.export.cases import SIZES
from ipa.export.checks import TOLERANCES, agreement, change, picture, worst
from ipa.export.cli import main


def tamper(bundle: Path, component: str) -> None:
    """Enlarge the largest tensor of a graph by a fifth and make the manifest agree."""
    path = bundle / component / "model.onnx"
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    largest.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(largest) * 1.2, largest.name))
    onnx.save_model(model, path)
    file = FileRecord(f"{component}/model.onnx", path.stat().st_size, hash_file(path))
    manifest = Manifest.from_json((bundle / FILE_NAME).read_text())
    record: ComponentRecord = replace(manifest.components[component], files=(file,))
    manifest = replace(manifest, components={**manifest.components, component: record})
    (bundle / FILE_NAME).write_text(manifest.to_json())


def add_again(bundle: Path, name: str) -> None:
    """List the bundle's adapter `tiny` under another name, too."""
    manifest = Manifest.from_json((bundle / FILE_NAME).read_text())
    (bundle / FILE_NAME).write_text(manifest.with_adapter(name, manifest.adapters["tiny"]).to_json())


def validate(bundle: Path, base: Path, adapter: Path, engine: str = "onnxruntime") -> Any:
    arguments = {"bundle": bundle, "base": base, "adapter": f"tiny={adapter}", "engine": engine}
    parts = (part for name, value in arguments.items() for part in (f"--{name}", str(value)))
    return CliRunner().invoke(main, ["validate", *parts])


def test_faithful_bundle_passes(tiny_bundle: Path, tiny_base: Path, tiny_adapter_file: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    add_again(bundle, "other")
    result = validate(bundle, tiny_base, tiny_adapter_file)
    assert result.exit_code == 0, result.output
    assert "--   ip_adapter/other             not compared: name it with --adapter other=..." in result.stdout
    figures = Bundle.open(bundle).manifest.validation
    assert figures["passed"] is True
    checks = {check["name"]: check for check in figures["checks"]}
    assert {"unet", "vae_encoder", "ip_adapter/tiny", "step, tiny", "step, tiny, scale 0", "run, tiny"} <= set(checks)
    assert (checks["ip_adapter/other"]["is_judged"], checks["ip_adapter/other"]["relative_error"]) == (False, None)
    add_again(bundle, "later")
    assert (
        "12 of 15 checks passed\n    not judged: run, no adapter\n    not judged: run, tiny\n"
        "    not judged: ip_adapter/other\n    added since, not judged: ip_adapter/later\n"
        in CliRunner().invoke(main, ["inspect", str(bundle)]).stdout
    )


def test_tampered_weights_fail(tiny_bundle: Path, tiny_base: Path, tiny_adapter_file: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    tamper(bundle, "text_kv")
    result = validate(bundle, tiny_base, tiny_adapter_file)
    assert result.exit_code == 1
    assert "differs from its models in: text_kv; step" in result.stderr.splitlines()[-1]
    assert Bundle.open(bundle).manifest.validation["passed"] is False


def test_pictures_below_35_db_fail() -> None:
    grey = np.full((3, 8, 8), 0.5)
    assert picture("x", "", grey, grey, grey).passed
    near = picture("x", "", grey + 10 ** (-36 / 20), grey, grey)  # an error of e everywhere: -20 log10(e) dB
    far = picture("x", "", grey + 10 ** (-34 / 20), grey, grey)
    assert (near.psnr, near.passed) == (pytest.approx(36), True)
    assert (far.psnr, far.passed) == (pytest.approx(34), False)
    assert "psnr 34.0 >= 35 dB" in str(far)
    chaotic = picture("x", "", grey + 10 ** (-34 / 20), grey, disturbed=grey + 10 ** (-20 / 20))
    assert (chaotic.passed, chaotic.is_judged) == (True, False)
    assert str(chaotic).startswith("--  ")
    assert "not judged: 1e-3 more noise alone gives 20.0 dB" in str(chaotic)


def test_agreement_is_measured_in_all_outputs() -> None:
    reference = {"a": np.array([1.0, -4.0]), "b": np.array([2.0])}
    assert agreement("x", "", reference, reference, 1e-4).passed
    check = agreement("x", "", {**reference, "b": np.array([2.1])}, reference, 1e-4)
    assert (check.passed, check.worst) == (False, ": b")
    assert check.relative_error == pytest.approx(0.05)
    assert not agreement("x", "", {"a": np.zeros(3)}, {"a": np.zeros(2)}, 1e-4).passed
    assert worst([check, agreement("x", "", reference, reference, 1e-4)]) == check


def test_pictures_are_judged_by_all_their_pixels() -> None:
    expected = {"image": np.ones((1, 3, 10, 10))}
    found = {"image": expected["image"].copy()}
    found["image"][0, 0, 0, 0] += 0.03  # RMS: 0.03 / sqrt(300)
    assert not agreement("x", "", found, expected, 1e-2).passed
    check = agreement("x", "", found, expected, 1e-2, is_picture=True)
    assert check.passed
    assert check.relative_error == pytest.approx(0.03 / 300**0.5)
    assert not agreement("x", "", {"image": expected["image"] + 0.03}, expected, 1e-2, is_picture=True).passed


def test_an_output_that_does_not_move_fails() -> None:
    output = np.array([1.0, 2.0])
    assert not change("x", output, output, 1e-4).passed
    assert change("x", output, -output, 1e-4).passed


@pytest.fixture(scope="module")
def half_bundle(tiny_base: Path, tiny_adapter_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP16 bundle with a merged FP16 graph (`merged/step.onnx`, scale 0.6) beside it."""
    folder = tmp_path_factory.mktemp("half")
    arguments = ["onnx", "--base", str(tiny_base), "--adapter", f"tiny={tiny_adapter_file}", "--dtype", "fp16"]
    arguments += ["--output", str(folder / "bundle"), "--merged", str(folder / "merged" / "step.onnx")]
    result = CliRunner().invoke(main, [*arguments, "--merged-scale", "0.6", "--default-steps", "20"])
    assert result.exit_code == 0, result.output
    assert Bundle.open(folder / "bundle").manifest.defaults.num_inference_steps == 20
    return folder


def step_inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "sample": (2, 4, 9, 16),
        "encoder_hidden_states": (2, 77, TEXT_WIDTH),
        "image_embeds": (2, EMBED_WIDTH),
    }
    inputs = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {**inputs, "timestep": torch.tensor(981.0)}


@pytest.fixture(scope="module")
def calm_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose UNet predicts little noise: random weights, but small errors stay small, as after training."""
    base = Path(shutil.copytree(tiny_base, tmp_path_factory.mktemp("calm") / "base"))
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.01)
    unet.save_pretrained(base / "unet")
    return base


@pytest.fixture(scope="module")
def calm_bundle(calm_base: Path, tiny_adapter_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`calm_base` in FP16."""
    bundle = tmp_path_factory.mktemp("calm") / "bundle"
    arguments = ["--base", str(calm_base), "--adapter", f"tiny={tiny_adapter_file}", "--dtype", "fp16"]
    assert CliRunner().invoke(main, ["onnx", *arguments, "--output", str(bundle)]).exit_code == 0
    return bundle


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_whole_runs_of_a_calm_model_are_judged(
    calm_base: Path,
    calm_bundle: Path,
    tiny_adapter_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
) -> None:
    monkeypatch.setattr("ipa.export.validate.SIZES", SIZES[:1])  # OpenVINO compiles for each; others test them
    bundle = Path(shutil.copytree(calm_bundle, tmp_path / "bundle"))
    result = validate(bundle, calm_base, tiny_adapter_file, engine)
    assert result.exit_code == 0, result.output
    runs = [line for line in result.stdout.splitlines() if " run, " in line]
    assert [line[:4] for line in runs] == ["ok  ", "ok  "]
    is_kept = bool(Bundle.open(bundle).manifest.validation)
    assert is_kept == (engine == "onnxruntime"), "figures of other engines are this machine's"


def test_half_precision_stays_near(half_bundle: Path, tiny_base: Path) -> None:
    bundle = Bundle.open(half_bundle / "bundle")
    assert {record.dtype for record in bundle.manifest.components.values()} == {"float16"}
    half = onnx.load(half_bundle / "bundle" / "unet" / "model.onnx")
    sizes = {1: 0, 10: 0}
    for tensor in half.graph.initializer:
        if tensor.data_type in sizes:
            sizes[tensor.data_type] += len(tensor.raw_data)
    assert sizes[1] < 0.01 * sizes[10], "only norms are float32"
    inputs = step_inputs(torch.float16)
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet").eval()
    with torch.no_grad():
        text = inputs["encoder_hidden_states"]
        expected = unet(inputs["sample"].float(), inputs["timestep"], text.float()).sample.numpy()
    with bundle.open_component("text_kv", "onnxruntime") as engine:
        text_kv = engine(encoder_hidden_states=text.numpy())["text_kv"]
    with bundle.open_component("unet", "onnxruntime") as engine:
        found = engine(
            sample=inputs["sample"].numpy(),
            timestep=inputs["timestep"].numpy(),
            text_kv=text_kv,
            image_kv=np.zeros((2, 1, bundle.manifest.kv_layout.size), np.float16),
        )["noise_pred"]
    assert found.dtype == np.float16
    assert agreement("unet", "", {"": found}, {"": expected}, TOLERANCES["float16"]).passed


def test_merged_graph_equals_diffusers(half_bundle: Path, tiny_base: Path, tiny_adapter_file: Path) -> None:
    file = half_bundle / "merged" / "step.onnx"
    meta = json.loads(file.with_name("step.onnx.meta.json").read_text())
    assert [(record["path"], record["sha256"]) for record in meta["files"]] == [
        (path.name, hash_file(path)) for path in (file, file.with_name("step.onnx.data"))
    ]
    assert (meta["adapter"]["tokens"], meta["ip_adapter_scale"], meta["dtype"]) == (4, 0.6, "float16")
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = ["sample", "timestep", "encoder_hidden_states", "image_embeds"]
    assert [tensor.name for tensor in session.get_inputs()] == names
    assert [tensor["name"] for tensor in meta["inputs"]] == names
    inputs = step_inputs(torch.float16)
    (found,) = session.run(["noise_pred"], {name: value.numpy() for name, value in inputs.items()})
    unet = diffusers_unet(tiny_base, tiny_adapter_file)
    sample, text, embeds = (inputs[name].float() for name in ("sample", "encoder_hidden_states", "image_embeds"))
    expected = diffusers_noise(unet, sample, 981, text, embeds, 0.6).numpy()
    assert agreement("merged", "", {"": found}, {"": expected}, TOLERANCES["float16"]).passed
    without = diffusers_noise(unet, sample, 981, text, embeds, 0.0).numpy()
    assert change("merged", found, without, 0.05).passed, "the adapter is inside"
