"""What `ipa-export onnx` writes, what `inspect` says of it, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from tiny import tiny_pipeline
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from ipa.engines.bundle import Bundle, hash_file
from ipa.engines.spec import COMPONENTS, SPECS, TensorSpec, adapter_spec
from ipa.export.adapters import adapter_graph, read_adapter
from ipa.export.attention import DOMAIN
from ipa.export.build import scheduler_advice
from ipa.export.cli import main
from ipa.export.dimensions import manifest_dimensions
from ipa.export.merged import MergedOptions, staged_merged
from ipa.export.onnx_export import export_graph

ONNX_DTYPES = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.INT64: "int64"}


def tensors(values: list[onnx.ValueInfoProto]) -> list[TensorSpec]:
    found = []
    for value in values:
        kind = value.type.tensor_type
        axes = tuple(axis.dim_param or axis.dim_value for axis in kind.shape.dim)
        found.append(TensorSpec(value.name, axes, ONNX_DTYPES[kind.elem_type]))
    return found


def test_graphs_have_the_tensors_of_the_spec_table(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    sizes = manifest_dimensions(bundle.manifest).sizes()
    expected = {name: SPECS[name].resolved(sizes, "float32") for name in COMPONENTS}
    expected["ip_adapter/tiny"] = adapter_spec("image_embeds").resolved({**sizes, "tokens": 4}, "float32")
    records = {**bundle.manifest.components, "ip_adapter/tiny": bundle.manifest.adapters["tiny"].component}
    assert list(bundle.manifest.components) == list(COMPONENTS)
    for name, spec in expected.items():
        model = onnx.load(tiny_bundle / name / "model.onnx", load_external_data=False)
        assert tuple(tensors(list(model.graph.input))) == spec.inputs
        assert tuple(tensors(list(model.graph.output))) == spec.outputs
        assert records[name].spec == spec
        assert {entry.domain: entry.version for entry in model.opset_import if entry.domain != DOMAIN} == {"": 18}


def test_graphs_hold_no_paths_and_no_sparse_tensors(tiny_bundle: Path) -> None:
    for path in tiny_bundle.rglob("*.onnx"):
        onnx.checker.check_model(str(path))
        content = path.read_bytes()
        for secret in (b"site-packages", b".py", str(Path.home()).encode() + b"/", str(tiny_bundle).encode()):
            assert secret not in content
        graph = onnx.load(path, load_external_data=False).graph
        assert not graph.sparse_initializer
    assert (tiny_bundle / "unet" / "model.onnx.data").stat().st_mode == (
        tiny_bundle / "unet" / "model.onnx"
    ).stat().st_mode


def test_keys_and_values_are_split_once(tiny_bundle: Path) -> None:
    graph = onnx.load(tiny_bundle / "unet" / "model.onnx", load_external_data=False).graph
    assert sum(node.op_type == "Split" and node.input[0] in ("text_kv", "image_kv") for node in graph.node) == 2


def test_same_weights_give_the_same_bytes(tiny_bundle: Path, tiny_adapter_file: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(tiny_bundle, verify=False).manifest
    dimensions = manifest_dimensions(manifest)
    weights = read_adapter(tiny_adapter_file, manifest.kv_layout, dimensions)
    (path,) = export_graph(adapter_graph("tiny", weights, dimensions, "float32"), tmp_path / "model.onnx", 18)
    assert hash_file(path) == manifest.adapters["tiny"].component.files[0].sha256


def test_tokenizer_gives_the_ids_of_the_pipeline(tiny_bundle: Path, tiny_base: Path) -> None:
    ours = Tokenizer.from_file(str(tiny_bundle / "tokenizer" / "tokenizer.json"))
    theirs = CLIPTokenizer.from_pretrained(tiny_base, subfolder="tokenizer")
    for text in ("", "a cat, on the grass!", "Zebra  é 漢字 <|endoftext|> 123"):
        expected = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours.encode(text).ids == expected


def test_manifest_describes_the_pipeline(tiny_bundle: Path, tiny_base: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert (manifest.defaults.height, manifest.defaults.width, manifest.defaults.adapter) == (128, 128, "tiny")
    assert (manifest.vae.scaling_factor, manifest.vae.downscale) == (0.18215, 8)
    assert manifest.image_processor.size == 48
    assert manifest.text_tokens == 77
    assert {"torch", "diffusers", "ipa-runtime"} <= set(manifest.created_by)
    copied = json.loads((tiny_bundle / "scheduler" / "scheduler_config.json").read_text())
    assert copied == json.loads((tiny_base / "scheduler" / "scheduler_config.json").read_text())


def test_inspect_needs_no_torch(tiny_bundle: Path) -> None:
    code = (
        "import sys\nfrom ipa.export.cli import main\n"
        "main(['inspect', sys.argv[1]], standalone_mode=False)\n"
        "print({'torch', 'onnx', 'diffusers', 'transformers', 'numpy.f2py'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, tiny_bundle], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert "16 cross-attention layers" in done.stdout
    assert "image_kv float32(batch, 4, 1632)" in done.stdout


def test_inspect_json(tiny_bundle: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(tiny_bundle), "--format", "json"])
    record = json.loads(result.stdout)
    assert record["components"]["unet"]["files"][1]["path"] == "unet/model.onnx.data"
    assert record["size"] == sum(file.size for file in Bundle.open(tiny_bundle).manifest.files())


@pytest.mark.parametrize("checks", [None, "all passed", [1], [{"name": "unet"}], [{"name": ["unet"], "passed": True}]])
def test_inspect_reads_a_foreign_validation(checks: object, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "validation": {"checks": checks}}))
    result = CliRunner().invoke(main, ["inspect", str(copy)])
    assert result.exit_code == 0, result.output
    assert "validation: recorded in another way than" in result.stdout


def test_inspect_refuses_a_changed_byte(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    data = copy / "unet" / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    result = CliRunner().invoke(main, ["inspect", str(copy)])
    assert result.exit_code == 2
    assert "model.onnx.data is damaged" in result.stderr


def test_a_scheduler_that_the_runtime_lacks_is_said(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(tiny_bundle, verify=False).manifest
    assert scheduler_advice(tiny_bundle, manifest) is None
    (tmp_path / "scheduler").mkdir()
    (tmp_path / manifest.scheduler.path).write_text('{"_class_name": "HeunDiscreteScheduler"}')
    advice = scheduler_advice(tmp_path, manifest)
    assert advice is not None
    assert "HeunDiscreteScheduler, which ipa-run does not have" in advice
    assert "--scheduler, one of ddim, pndm" in advice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "/no/such/folder"], "neither a folder nor a Hub id"),
        (["--opset", "23"], "--opset"),
        (["--dtype", "int8"], "--dtype"),
        (["--adapter", "no.bin"], "no such adapter file"),
        (["--merged", "step.onnx"], "--adapter"),
        (["--merged-scale", "nan"], "finite"),
        (["--merged-scale", "0.3"], "goes with --merged"),
    ],
)
def test_refuses_options(arguments: list[str], message: str, tiny_base: Path, tmp_path: Path) -> None:
    base = [] if "--base" in arguments else ["--base", str(tiny_base)]
    result = CliRunner().invoke(main, ["onnx", *base, "--output", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_never_writes_over_what_it_reads(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    base = tiny_pipeline(bundle / "base")
    result = CliRunner().invoke(main, ["onnx", "--base", str(base), "--output", str(bundle), "--force"])
    assert result.exit_code == 2
    assert "would replace" in result.stderr
    assert (base / "model_index.json").exists()


@pytest.mark.parametrize(
    ("merged", "force", "message"),
    [
        ("adapter.safetensors", True, "which is read"),
        ("keep.onnx", False, "allow it with --force"),
        ("step.onnx", False, "step.onnx.meta.json; allow it with --force"),
        ("out/step.onnx", True, "lie in each other"),
    ],
)
def test_never_merges_over_other_files(
    merged: str, force: bool, message: str, tiny_base: Path, tiny_adapter_file: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_adapter_file, tmp_path / "adapter.safetensors")
    for name in ("keep.onnx", "step.onnx.meta.json"):
        (tmp_path / name).write_text(name)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = ["--base", tiny_base, "--adapter", tmp_path / "adapter.safetensors", "--output", tmp_path / "out"]
    arguments += ["--merged", tmp_path / merged, *(["--force"] if force else [])]
    result = CliRunner().invoke(main, ["onnx", *map(str, arguments)])
    assert (result.exit_code, message in result.stderr) == (2, True), result.output
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failed_export_keeps_the_old_merged_files(tmp_path: Path) -> None:
    (tmp_path / "step.onnx").write_text("old")
    with pytest.raises(KeyboardInterrupt), staged_merged(MergedOptions(tmp_path / "step.onnx")) as folder:
        (folder / "step.onnx").write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "step.onnx").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["step.onnx"]


def test_vae_halves_equal_diffusers(tiny_bundle: Path, tiny_base: Path) -> None:
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny_base / "vae").eval().requires_grad_(False)
    bundle = Bundle.open(tiny_bundle, verify=False)
    latents, image = torch.randn(1, 4, 9, 8), torch.rand(2, 3, 64, 72) * 2 - 1
    with bundle.open_component("vae_decoder", "onnxruntime") as engine:
        np.testing.assert_allclose(engine(latents=latents.numpy())["image"], vae.decode(latents).sample, atol=1e-4)
    with bundle.open_component("vae_encoder", "onnxruntime") as engine:
        found, expected = engine(image=image.numpy()), vae.encode(image).latent_dist
    np.testing.assert_allclose(found["latent_mean"], expected.mean, atol=1e-4)
    np.testing.assert_allclose(found["latent_logvar"], expected.logvar, atol=1e-4)
