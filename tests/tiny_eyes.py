"""Tiny random models that look at pictures, and pictures for them to look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics.image.fid
from PIL import Image
from tiny import shake, tiny_tokenizer
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from ipa.benchmarks.quality_lpips import alexnet_features

SIDE = 32


def tiny_clip(folder: Path, seed: int = 0) -> CLIPModel:
    """Save a CLIP with tokenizer and preprocessing; the model that was saved."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**layers, **ends, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        vision_config={**layers, "image_size": SIDE, "patch_size": 8},
        projection_dim=24,
    )
    return _saved(CLIPModel(config), folder, tokenizer)


def tiny_dino(folder: Path, kind: str = "vit") -> Any:
    """The same of a ViT as DINO is, or a DINOv2."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 8}
    if kind == "vit":
        return _saved(ViTModel(ViTConfig(**sizes, intermediate_size=48), add_pooling_layer=False), folder)
    return _saved(Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2)), folder)


class Extractor(torch.nn.Module):
    """In Inception's place: from uint8 pictures of any size to 5 features."""

    num_features = 5

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.adaptive_avg_pool2d(pixels.float(), 2).flatten(1) / 255
        return small[:, :5] + 0.5 * small[:, 5:10]


def stand_in_for_inception(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """A weights file; torchmetrics then has `Extractor` for its network."""
    real = torchmetrics.image.fid.FrechetInceptionDistance

    def stand_in(feature: Any, feature_extractor_weights_path: str | None = None) -> Any:
        return real(Extractor() if feature == 2048 else feature)

    monkeypatch.setattr(torchmetrics.image.fid, "FrechetInceptionDistance", stand_in)
    file = folder / "inception.pth"
    file.write_bytes(b"weights")
    return file


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """Soft random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def coco(folder: Path, count: int = 3, captions: str = "captions_val2017.json") -> Path:
    """COCO's layout with pictures 0, 1, ... under the ids 10, 11, ..., two captions each."""
    (folder / "val2017").mkdir(parents=True)
    file = folder / captions
    file.parent.mkdir(exist_ok=True)
    images = [{"id": 10 + i, "file_name": f"{10 + i:012}.jpg"} for i in range(count)]
    for number, image in enumerate(images):
        picture(number).save(folder / "val2017" / str(image["file_name"]))
    texts = ("a cat on the grass", "a red dog", "photo of a house")
    annotations = [
        {"image_id": image["id"], "id": 900 - which, "caption": f"{texts[i % 3]}{' again' * which}"}
        for which in (0, 1)
        for i, image in enumerate(images)
    ]
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


def _saved(model: Any, folder: Path, *parts: Any) -> Any:
    shake(model)
    size = {"height": SIDE, "width": SIDE}
    for part in (model, CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size), *parts):
        part.save_pretrained(folder)
    return model.eval()


def all_eyes(folder: Path) -> dict[str, Path]:
    """`clip`, `dino` and `lpips`, `data` in COCO's layout, and `bare`, a pipeline of which nothing is there."""
    tiny_clip(folder / "clip"), tiny_dino(folder / "dino"), coco(folder / "data")
    (folder / "bare").mkdir()
    (folder / "bare" / "model_index.json").write_text("{}")
    convolutions = alexnet_features().state_dict()
    torch.save({f"features.{name}": one for name, one in convolutions.items()}, folder / "lpips")
    return {name: folder / name for name in ("clip", "dino", "data", "bare", "lpips")}
