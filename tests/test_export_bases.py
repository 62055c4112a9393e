"""Base models that cannot be exported: refused in one line before the minutes of work, with nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from ipa.engines.errors import IpaError
from ipa.export.cli import main
from ipa.export.pipeline import BasePipeline


def cut(path: str, size: int) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        (base / path).write_bytes((base / path).read_bytes()[:size])

    return change


def edit_config(path: str, **fields: object) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        config = json.loads((base / path).read_text())
        (base / path).write_text(json.dumps({**config, **fields}))

    return change


def only_merges(content: bytes) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        shutil.rmtree(base / "tokenizer")
        (base / "tokenizer").mkdir()
        (base / "tokenizer" / "merges.txt").write_bytes(content)

    return change


PREPROCESSOR = "feature_extractor/preprocessor_config.json"
BAD_BASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no model_index.json": (lambda base: (base / "model_index.json").unlink(), "no model_index.json"),
    "another family": (
        edit_config("model_index.json", _class_name="StableDiffusion3Pipeline"),
        "StableDiffusion3Pipeline, which is not supported",
    ),
    "half an xl": (
        edit_config("model_index.json", _class_name="StableDiffusionXLPipeline"),
        "no text_encoder_2/config.json",
    ),
    "no image encoder": (lambda base: shutil.rmtree(base / "image_encoder"), "--image-encoder"),
    "no unet": (lambda base: shutil.rmtree(base / "unet"), "no unet/config.json"),
    "no tokenizer": (lambda base: shutil.rmtree(base / "tokenizer"), "tokenizer"),
    "truncated weights": (cut("text_encoder/model.safetensors", 1000), "cannot load text_encoder"),
    "broken json": (cut("unet/config.json", 100), "not readable JSON"),
    "time condition": (edit_config("unet/config.json", time_cond_proj_dim=256), "time_cond_proj_dim"),
    "another model": (edit_config("unet/config.json", in_channels=5), "takes 5 channels, expected 4"),
    "text width": (edit_config("unet/config.json", cross_attention_dim=64), "wants text of width 64"),
    "another unet": (edit_config("unet/config.json", _class_name="UNet3D"), "the unet is a UNet3D"),
    "no channels": (edit_config("unet/config.json", block_out_channels=None), "unet/config.json is no"),
    "unknown blocks": (edit_config("unet/config.json", down_block_types=["Nope"] * 4), "unet/config.json is no"),
    "one size": (edit_config("unet/config.json", sample_size=[16]), "unet/config.json is no"),
    "no scaling": (edit_config("vae/config.json", scaling_factor=None), "vae/config.json is no"),
    "no vae channels": (edit_config("vae/config.json", block_out_channels=None), "vae/config.json is no"),
    "text size": (edit_config("text_encoder/config.json", hidden_size="big"), "text_encoder/config.json is no"),
    "no patches": (edit_config("image_encoder/config.json", patch_size=None), "image_encoder/config.json is no"),
    "no text": (only_merges(b"\xff\xfe\x00"), "merges.txt is no"),
    "not normalised": (edit_config(PREPROCESSOR, do_normalize=False), "do_normalize is False"),
    "not cropped": (edit_config(PREPROCESSOR, do_center_crop=False), "do_center_crop is False"),
    "another size": (edit_config(PREPROCESSOR, size={"shortest_edge": 64}), "size is {'shortest_edge': 64}"),
    "squashed": (edit_config(PREPROCESSOR, size={"height": 48, "width": 48}), "size is {'height': 48"),
    "another crop": (edit_config(PREPROCESSOR, crop_size=40), "crop_size is 40"),
    "another scale": (edit_config(PREPROCESSOR, rescale_factor=1 / 127), "rescale_factor is 0.0078"),
    "two colours": (edit_config(PREPROCESSOR, image_mean=[0.5, 0.5]), "image_mean is [0.5, 0.5]"),
    "another processor": (edit_config(PREPROCESSOR, image_processor_type="ViTImageProcessor"), "'ViTImageProcessor'"),
}


@pytest.mark.parametrize("case", BAD_BASES)
def test_refuses_a_base_model(case: str, tiny_base: Path, tmp_path: Path) -> None:
    change, message = BAD_BASES[case]
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    change(base)
    result = CliRunner().invoke(main, ["onnx", "--base", str(base), "--output", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"], "nothing is left behind"


def test_preprocessing_is_the_pipelines(tiny_base: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    edit_config(PREPROCESSOR, image_mean=[0.5] * 3, size=48, crop_size=48, do_convert_rgb=None)(base)
    assert BasePipeline(str(base)).image_processor.mean == (0.5, 0.5, 0.5)
    edit_config(PREPROCESSOR, size=64, crop_size=64)(base)
    apart = BasePipeline(str(base), str(base / "image_encoder")).image_processor
    assert (apart.size, apart.mean[0]) == (48, 0.48145466), "of the pipeline's size is another encoder's"


def test_a_scheduler_that_validation_cannot_take_is_one_message(tiny_base: Path, tmp_path: Path) -> None:
    from ipa.export.whole_run import reference_scheduler

    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    edit_config("scheduler/scheduler_config.json", beta_schedule="nope")(base)
    with pytest.raises(IpaError, match=r"scheduler_config\.json is no .*nope"):
        reference_scheduler(BasePipeline(str(base)))
