"""Export of Stable Diffusion XL: what is in the bundle, what validates and builds, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL, UNet2DConditionModel
from oracle import diffusers_unet
from safetensors import safe_open
from tiny import tiny_tokenizer
from tiny_xl import TEXT_EMBED_WIDTH, TEXT_WIDTHS, TIME_EMBED
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from ipa.benchmarks.full_size import CLIP_TEXT_2, FULL_XL, Sizes, write_pipeline
from ipa.engines.bundle import Bundle
from ipa.engines.errors import BundleError, IpaError, RequestError
from ipa.engines.manifest import FILE_NAME
from ipa.engines.plan_cache import PlanCache
from ipa.engines.shape_profile import ShapeProfile
from ipa.engines.spec import family_specs
from ipa.export.adapters import AdapterFile
from ipa.export.build import ExportRequest, export_bundle
from ipa.export.bundle_adapters import add_adapter
from ipa.export.cli import main
from ipa.export.controlnets import ControlNetSource
from ipa.export.dimensions import manifest_dimensions
from ipa.export.engine_builds import EngineBuilds
from ipa.export.merged import MergedOptions
from ipa.export.pipeline import BasePipeline
from ipa.export.validate import Validator
from ipa.runtime import Pipeline, Request
from ipa.runtime.cli import run

Change = Callable[[Path], None]


def test_the_bundle_has_the_components_of_the_family(tiny_xl_inpainting: tuple[Path, Path]) -> None:
    folder = tiny_xl_inpainting[1]
    manifest = Bundle.open(folder).manifest
    assert manifest.family == "sdxl"
    assert list(manifest.components) == list(family_specs("sdxl"))
    sizes = manifest_dimensions(manifest).sizes()
    assert (sizes["text_width_1"], sizes["text_width_2"], sizes["text_width"]) == (*TEXT_WIDTHS, sum(TEXT_WIDTHS))
    for name, spec in family_specs("sdxl").items():
        assert manifest.components[name].spec == spec.resolved(sizes, "float32")
        graph = onnx.load(folder / name / "model.onnx", load_external_data=False).graph
        assert [value.name for value in graph.input] == [tensor.name for tensor in spec.inputs]
    assert len(manifest.kv_layout.layers) == 2 * 2 + 2 * 3 + 3 * 3 + 3 * 2 + 3
    assert manifest.tokenizer_2 is not None
    assert not manifest.force_zeros_for_empty_prompt, "as this model says"
    assert manifest.vae.scaling_factor == 0.13025


def test_the_first_encoder_s_last_layer_is_left_out(tiny_xl_bundle: Path) -> None:
    graph = onnx.load(tiny_xl_bundle / "text_encoder" / "model.onnx", load_external_data=False).graph
    names = [weight.name for weight in graph.initializer]
    assert any("layers.1." in name for name in names)
    assert not any("layers.2." in name or "final_layer_norm" in name for name in names)


def test_half_precision_leaves_a_vae_that_overflows_in_float32(tiny_xl_half_bundle: Path) -> None:
    manifest = Bundle.open(tiny_xl_half_bundle).manifest
    dtypes = {name: record.dtype for name, record in manifest.components.items()}
    assert {name for name, dtype in dtypes.items() if dtype == "float32"} == {"vae_decoder", "vae_encoder"}
    types = {tensor.name: tensor.dtype for tensor in manifest.components["unet"].spec.inputs}
    assert (types["timestep"], types["time_ids"], types["text_embeds"]) == ("float32", "float32", "float16")
    with Pipeline.open(tiny_xl_half_bundle, engine="onnxruntime") as pipe:
        fields = {"prompt": "a cat", "num_inference_steps": 1, "height": 64, "width": 64, "seed": 1}
        assert pipe.run(Request(**fields)).images[0].size == (64, 64)


def test_a_repaired_vae_is_half(tiny_xl_base: Path, tmp_path: Path) -> None:
    """As the fp16-fix one: given with --vae, with a configuration of its own."""
    torch.manual_seed(3)
    config = json.loads((tiny_xl_base / "vae" / "config.json").read_text())
    AutoencoderKL.from_config({**config, "force_upcast": False}).save_pretrained(tmp_path / "vae")
    arguments = ["--base", tiny_xl_base, "--vae", tmp_path / "vae", "--dtype", "fp16", "--output", tmp_path / "bundle"]
    result = CliRunner().invoke(main, ["onnx", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert {record.dtype for record in manifest.components.values()} == {"float16"}
    assert manifest.sources["vae"].name == "vae"


@pytest.mark.parametrize(("folder", "control"), [("tiny_xl_bundle", "pose"), ("tiny_xl_half_bundle", "edges")])
def test_it_validates(
    folder: str,
    control: str,
    request: pytest.FixtureRequest,
    tiny_xl_base: Path,
    tiny_xl_files: dict[str, Path],
    tiny_xl_controlnets: dict[str, Path],
) -> None:
    files = [AdapterFile(name, file) for name, file in tiny_xl_files.items()]
    controls = [ControlNetSource(control, str(tiny_xl_controlnets[control]))]
    bundle = request.getfixturevalue(folder)
    checks = list(Validator(bundle, str(tiny_xl_base), None, files, controlnets=controls).run())
    assert [check.name for check in checks if not check.passed] == []
    names = {check.name for check in checks}
    assert {"text_encoder_2", "unet", "step, base", "step, plus", "run, base"} <= names
    assert {f"controlnet/{control}", f"step, controlnet/{control}"} <= names


BUILT = ("text_encoder_2", "unet", "controlnet/edges", "vae_decoder")


def test_engines_build(tiny_xl_half_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_xl_half_bundle, verify=False)
    profile = ShapeProfile.parse(["128x128"], "1", "4")
    builds = EngineBuilds(bundle, PlanCache(tmp_path / "cache"), "tensorrt-rtx", profile, ("8.6",))
    jobs = [job for job in builds.survey()[1] if job.component in BUILT]
    tensors = {outcome.component: outcome.header.tensors for outcome in builds.run(jobs)}
    assert tensors["unet"]["text_embeds"] == "float16 1x36:2x36:2x36"
    assert tensors["unet"]["time_ids"] == "float32 1x6:2x6:2x6"
    for name in ("text_embeds", "time_ids"):
        assert tensors["controlnet/edges"][name] == tensors["unet"][name]
    assert tensors["text_encoder_2"]["text_embeds"] == "float16 ?x36"
    assert tensors["vae_decoder"]["image"] == "float32 ?x3x?x?"


def test_one_merged_graph(tiny_xl_base: Path, tiny_xl_files: dict[str, Path], tmp_path: Path) -> None:
    file, adapter = tmp_path / "merged.onnx", tiny_xl_files["base"]
    adapters = (AdapterFile("base", adapter),)
    request = ExportRequest(str(tiny_xl_base), tmp_path / "b", adapters=adapters, merged=MergedOptions(file, 0.7))
    shown: list[tuple[str, int]] = []
    export_bundle(request, lambda part, total: shown.append((part, total)))
    assert {total for _, total in shown} == {len(shown)}, "all parts were announced"
    draw = np.random.default_rng(0).standard_normal
    inputs = {
        "sample": draw((2, 4, 9, 16), np.float32),
        "timestep": np.asarray(500, np.float32),
        "encoder_hidden_states": draw((2, 77, sum(TEXT_WIDTHS)), np.float32),
        "image_embeds": draw((2, 40), np.float32),
        "text_embeds": draw((2, TEXT_EMBED_WIDTH), np.float32),
        "time_ids": np.array([[64, 96, 0, 8, 72, 128]] * 2, np.float32),
    }
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, inputs)
    unet = diffusers_unet(tiny_xl_base, adapter)
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.7]
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    added = {"image_embeds": [tensors["image_embeds"][:, None]]}
    added |= {name: tensors[name] for name in ("text_embeds", "time_ids")}
    with torch.no_grad():
        expected = unet(
            tensors["sample"], 500, tensors["encoder_hidden_states"], added_cond_kwargs=added
        ).sample.numpy()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_adapters_of_other_families_are_refused_with_both_sides(
    tiny_xl_bundle: Path, tiny_bundle: Path, tiny_adapter_file: Path, tiny_xl_files: dict[str, Path]
) -> None:
    with pytest.raises(IpaError, match=r"for a base model of text width 48, this one has 64 \(768: .* 2048: XL\)"):
        add_adapter(tiny_xl_bundle, AdapterFile("other", tiny_adapter_file), force=False, is_default=False)
    with pytest.raises(IpaError, match="for a base model of text width 64, this one has 48"):
        add_adapter(tiny_bundle, AdapterFile("other", tiny_xl_files["base"]), force=False, is_default=False)


def test_the_second_tokenizer_may_be_in_the_old_files(tiny_xl_base: Path, tmp_path: Path) -> None:
    """As published: `vocab.json`, `merges.txt` and the padding token in the configurations."""
    base = Path(shutil.copytree(tiny_xl_base, tmp_path / "base"))
    folder = base / "tokenizer_2"
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "!"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    found = BasePipeline(str(base)).load_tokenizer("tokenizer_2")
    for text in ("", "a cat on the grass!"):
        expected = tiny_tokenizer(pad_token="!")(text, padding="max_length", max_length=77).input_ids
        assert found.encode(text).ids == expected
        own = CLIPTokenizer.from_pretrained(folder)(text, padding="max_length", max_length=77).input_ids
        assert found.encode(text).ids == own


def edit_config(file: str, **values: Any) -> Change:
    def change(base: Path) -> None:
        config = json.loads((base / file).read_text())
        (base / file).write_text(json.dumps({**config, **values}))

    return change


REFINER_WIDTH = TEXT_EMBED_WIDTH + 5 * TIME_EMBED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit_config("model_index.json", requires_aesthetics_score=True), "is a refiner of Stable Diffusion XL"),
        (edit_config("model_index.json", text_encoder=[None, None]), "is a refiner of Stable Diffusion XL"),
        (edit_config("unet/config.json", projection_class_embeddings_input_dim=REFINER_WIDTH), "is a refiner"),
        (edit_config("unet/config.json", projection_class_embeddings_input_dim=7), "the unet takes 7 numbers"),
        (edit_config("unet/config.json", addition_embed_type=None), "beside the timestep"),
        (edit_config("unet/config.json", addition_embed_type="image"), "the unet uses addition_embed_type"),
        (edit_config("unet/config.json", time_cond_proj_dim=8), "the unet uses time_cond_proj_dim"),
        (edit_config("unet/config.json", cross_attention_dim=24), "wants text of width 24, the text encoder gives 64"),
        (edit_config("text_encoder_2/config.json", max_position_embeddings=64), "the text encoders take"),
        (edit_config("vae/config.json", latents_mean=[0.0] * 4), "its vae has a latents_mean"),
        (edit_config("model_index.json", _class_name="StableDiffusionXLInstructPix2PixPipeline"), "not supported yet"),
    ],
)
def test_pipelines_that_are_refused(tiny_xl_base: Path, tmp_path: Path, change: Change, message: str) -> None:
    base = Path(shutil.copytree(tiny_xl_base, tmp_path / "base"))
    change(base)
    result = CliRunner().invoke(main, ["onnx", "--base", str(base), "--output", str(tmp_path / "bundle")])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "bundle").exists()


def test_a_family_of_a_later_version_is_refused(tiny_xl_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text((tiny_xl_bundle / FILE_NAME).read_text().replace('"sdxl"', '"sd9"'))
    with pytest.raises(BundleError, match=r"of the family 'sd9', this ipa-runtime knows sd15, sdxl; upgrade"):
        Bundle.open(tmp_path)


def test_the_full_size_is_the_published_one() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**FULL_XL.unet)
        text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**FULL_XL.text_2))
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_463_684
    assert sum(parameter.numel() for parameter in text_encoder_2.parameters()) == 694_659_840


def test_random_pipelines_for_benchmarks_open(tmp_path: Path) -> None:
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    unet = {"block_out_channels": (32, 64, 64), "transformer_layers_per_block": 1, "cross_attention_dim": 128}
    unet |= {"attention_head_dim": 2, "norm_num_groups": 8, "projection_class_embeddings_input_dim": 1280 + 6 * 256}
    sizes = Sizes(
        {**FULL_XL.unet, **unet},
        {**FULL_XL.vae, "block_out_channels": (16, 16, 32, 32), "norm_num_groups": 8},
        {**FULL_XL.text, **small},
        {**FULL_XL.vision, **small},
        {**CLIP_TEXT_2, **small},
    )
    write_pipeline(tmp_path / "base", sizes=sizes, dtype="float16")
    base = BasePipeline(str(tmp_path / "base"))
    assert (base.family, base.defaults.width, base.text_width, base.text_embed_width) == ("sdxl", 1024, 128, 1280)
    assert base.load_tokenizer("tokenizer_2").padding["pad_token"] == "!"
    with safe_open(tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.get_slice("conv_in.weight").get_dtype() == "F16"


def test_sizes_on_the_command_line(tiny_xl_bundle: Path, tmp_path: Path) -> None:
    plain, sized, again = (str(tmp_path / name) for name in ("plain.png", "sized.png", "again.png"))
    command = ["--bundle", str(tiny_xl_bundle), "--engine", "onnxruntime", "--prompt", "a cat", "--steps", "2"]
    command += ["--height", "64", "--width", "72", "--seed", "3", "--format", "json"]
    sizes = ["--original-size", "200x96", "--crop", "24,8", "--target-size", "72x128"]
    assert CliRunner().invoke(run, [*command, "--output", plain], catch_exceptions=False).exit_code == 0
    result = CliRunner().invoke(run, [*command, *sizes, "--output", sized], catch_exceptions=False)
    record = json.loads(result.stdout)["request"]
    found = [record[name] for name in ("original_size", "crops_coords_top_left", "target_size")]
    assert found == [[96, 200], [8, 24], [128, 72]], "diffusers' order: height and top first"
    assert CliRunner().invoke(run, ["--from", sized, "--output", again], catch_exceptions=False).exit_code == 0
    pixels = [Path(name).read_bytes() for name in (plain, sized, again)]
    assert pixels[0] != pixels[1]
    assert pixels[1] == pixels[2]


@pytest.mark.parametrize("option", [["--original-size", "200"], ["--crop", "1x2"], ["--target-size", "axb"]])
def test_sizes_that_are_none(option: list[str]) -> None:
    result = CliRunner().invoke(run, [*option, "--prompt", "a cat"])
    assert result.exit_code == 2
    assert f"{option[1]!r} is not " in result.stderr


def test_the_demo_refuses_sizes(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="original_size is for Stable Diffusion XL, this bundle is of the family"):
        CliRunner().invoke(
            run,
            ["--prompt", "a star", "--original-size", "64x64", "--output", str(tmp_path / "x.png")],
            catch_exceptions=False,
        )
