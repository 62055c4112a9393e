"""LoRA files, added into the weights that they change: `W + scale * alpha / rank * up @ down` (arXiv:2106.09685, (3)).

Every layout names the same thing, a layer and its two matrices. Layers are looked up among the model's own by their
exact name, so a weight that belongs to another model is an error here and never left out in silence.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ipa.engines.bundle import hash_file
from ipa.engines.errors import IpaError, first_line
from ipa.engines.manifest import LoraRecord
from ipa.engines.spec import SDXL
from ipa.export.family import TITLES
from ipa.export.sgm_names import diffusers_name
from ipa.export.weight_files import named_tensors, read_weights

PARTS = ("unet", "text_encoder", "text_encoder_2")
# diffusers and peft: a dotted module path, then one of the endings that were in use over the years.
_DOTTED = re.compile(
    r"(?P<layer>.+?)(?:\.(?P<to>to_[qkv]|to_out)_lora\.|\.lora(?:_linear_layer)?\.|\.lora_)"
    r"(?P<side>A|B|down|up)(?:\.\w+)?\.weight"
)
# kohya: module path with underscores for dots. Files for SDXL say te1 and te2.
_KOHYA = re.compile(
    r"lora_(?P<part>unet|te1?|te2)_(?P<layer>[^.]+)\.(?:lora_(?P<side>down|up)\.weight|(?P<alpha>alpha))"
)
_KOHYA_PARTS = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
_OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_METADATA = "lora_adapter_metadata"  # peft's configuration, where diffusers' `save_lora_weights` puts it
_OTHER_KINDS = ("hada_", "lokr_", "dora_scale", "lora_magnitude_vector", "lora_mid", "oft_", "glora")


@dataclass(frozen=True)
class LoraFile:
    """A file and the weight it is added with; `None`: 1, or what a bundle was made with."""

    path: Path
    scale: float | None = None


@dataclass
class _Change:
    """One layer's matrices: `down` (rank, in, ...), `up` (out, rank, ...)."""

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None

    def delta(self) -> Tensor:
        """What is added at scale 1, (out, in * kernel), float32."""
        assert self.down is not None and self.up is not None
        down, up = self.down.float().flatten(1), self.up.float().flatten(1)
        return up @ down * (1.0 if self.alpha is None else self.alpha / len(down))


@dataclass(frozen=True)
class Lora:
    """A file that was read for a family: what it changes in each part of a pipeline, by layer name."""

    record: LoraRecord
    path: Path
    family: str
    changes: Mapping[str, Mapping[str, _Change]] = field(repr=False)

    def check(self, models: Mapping[str, nn.Module]) -> None:
        """Compare names and shapes with a base model.

        Args:
            models: every part that it has of `PARTS`; they may be on the meta device.
        Raises:
            IpaError: the file was made for another base model.
        """
        for part, changes in self.changes.items():
            if changes and part not in models:
                raise IpaError(
                    f"lora {self.path} changes {part}.{next(iter(changes))}, a text encoder that {TITLES[SDXL]} alone "
                    f"has; {self._advice}"
                )
        for part, model in models.items():
            for name, weight, change in self._layers(part, model):
                self._check_sizes(f"{part}.{name}", weight, change)

    def _check_sizes(self, name: str, weight: Tensor, change: _Change) -> None:
        assert change.down is not None and change.up is not None
        wanted = (weight.shape[0], weight[0].numel())
        found = (change.up.shape[0], change.down.flatten(1).shape[1])
        if found != wanted or change.up.flatten(1).shape[1] != change.down.shape[0]:
            raise IpaError(
                f"lora {self.path}: {name} changes a layer of size {found[1]} to {found[0]}, this base "
                f"model has {wanted[1]} to {wanted[0]}; {self._advice}"
            )

    def fuse(self, part: str, model: nn.Module) -> None:
        """Add this LoRA to a model's weights, in place."""
        with torch.no_grad():
            for _, weight, change in self._layers(part, model):
                weight += (self.record.scale * change.delta()).reshape(weight.shape).to(weight.dtype)

    def _layers(self, part: str, model: nn.Module) -> Iterator[tuple[str, Tensor, _Change]]:
        layers = {
            _plain(name): module.weight
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        config: Any = model.config
        seen: dict[str, str] = {}
        for name, change in self.changes[part].items():
            layer = diffusers_name(name, config.layers_per_block) if part == "unet" else name
            if layer not in layers:
                raise IpaError(
                    f"lora {self.path} changes {part}.{name}, which this base model does not have; {self._advice}"
                )
            if layer in seen:
                raise IpaError(f"lora {self.path} names {part}.{layer} twice, as {seen[layer]} and as {name}")
            seen[layer] = name
            yield name, layers[layer], change

    @property
    def _advice(self) -> str:
        return f"use a LoRA made for {TITLES[self.family]}"


def read_lora(file: LoraFile, family: str) -> Lora:
    """Read a LoRA in diffusers', peft's or kohya's layout.

    Args:
        family: of the base model that it is for.
    Raises:
        IpaError: the file is missing, damaged, unsafe, or no plain LoRA.
    """
    tensors = named_tensors(read_weights(file.path, "lora"), file.path, "lora")
    changes: dict[str, dict[str, _Change]] = {part: {} for part in PARTS}
    for key, tensor in tensors.items():
        if kind := next((kind for kind in _OTHER_KINDS if kind in key), None):
            raise IpaError(f"lora {file.path} has {key}: {kind.strip('_')} is not supported, expected a plain LoRA")
        part, layer, side = _parsed(key, file.path)
        _check_tensor(tensor, f"lora {file.path}: {key}", is_scalar=side == "alpha")
        change = changes[part].setdefault(_plain(layer), _Change())
        if side == "alpha":
            change.alpha = float(tensor)
        elif side in ("A", "down"):
            change.down = tensor
        else:
            change.up = tensor
    _apply_metadata(file.path, changes)
    for part in PARTS:
        for layer, change in changes[part].items():
            if change.down is None or change.up is None:
                raise IpaError(f"lora {file.path}: {part}.{layer} has one matrix and not two; the file is incomplete")
    scale = 1.0 if file.scale is None else file.scale
    return Lora(LoraRecord(file.path.name, hash_file(file.path), scale), file.path, family, changes)


def _check_tensor(tensor: Tensor, what: str, is_scalar: bool) -> None:
    """Refuse what is neither a matrix nor, of an alpha, a number."""
    fits = tensor.numel() == 1 if is_scalar else tensor.ndim >= 2 and tensor.numel() > 0
    if not fits or tensor.layout != torch.strided:
        raise IpaError(
            f"{what} has the shape {tuple(tensor.shape)}, expected {'one number' if is_scalar else 'a matrix'}"
        )
    if not torch.isfinite(tensor.float()).all():
        raise IpaError(f"{what} holds values that are not finite")


def _parsed(key: str, path: Path) -> tuple[str, str, str]:
    """Part, layer and side (`A`, `B`, `down`, `up`, `alpha`) of a key; kohya's layers keep their underscores."""
    if match := _KOHYA.fullmatch(key):
        return _KOHYA_PARTS[match["part"]], match["layer"], match["side"] or "alpha"
    if match := _DOTTED.fullmatch(key.replace(".processor.", ".").replace("base_model.model.", "")):
        part, _, layer = match["layer"].partition(".")
        if part not in PARTS:  # files of the UNet alone have no prefix
            part, layer = "unet", match["layer"]
        if to := match["to"]:
            layer += f".{_OLD_TEXT_NAMES[to]}" if part != "unet" else f".{to}{'.0' * (to == 'to_out')}"
        return part, layer, match["side"]
    raise IpaError(f"lora {path} has {key[:80]!r}, which is in none of the layouts of diffusers, peft and kohya")


def _plain(name: str) -> str:
    """A layer's name as all layouts give it: without dots, and without the level that transformers 5.6 removed."""
    return name.removeprefix("text_model.").replace(".", "_").removeprefix("text_model_")


def _apply_metadata(path: Path, changes: Mapping[str, Mapping[str, _Change]]) -> None:
    """Take `alpha` from peft's configuration, which newer files of diffusers carry in their header."""
    if path.suffix != ".safetensors":
        return
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(_METADATA)
    if text is None:
        return
    try:
        options: dict[str, Any] = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise IpaError(f"lora {path}: its {_METADATA} is not JSON; the file is damaged") from error
    for part in PARTS:
        for name, change in changes[part].items():
            try:
                alpha = None if change.down is None else _alpha(options, part, name, len(change.down))
            except (ValueError, TypeError, AttributeError) as error:
                raise IpaError(
                    f"lora {path}: its {_METADATA} has no usable alpha for {part}.{name} ({first_line(error)}); the "
                    "file is damaged"
                ) from error
            change.alpha = change.alpha if alpha is None else alpha


def _alpha(options: Mapping[str, Any], part: str, name: str, rank: int) -> float | None:
    """peft's `lora_alpha` of one layer; `alpha_pattern` holds the layers that differ, by the end of their name."""
    alpha = options.get(f"{part}.lora_alpha")
    for pattern, value in (options.get(f"{part}.alpha_pattern") or {}).items():
        if f"_{name}".endswith(f"_{_plain(pattern.removeprefix('^'))}"):
            alpha = value
    if alpha is None:
        return None
    if not math.isfinite(float(alpha)):
        raise ValueError(f"alpha is {alpha}")
    # rsLoRA, arXiv:2312.03732, divides by the root of the rank.
    return float(alpha) * (rank**0.5 if options.get(f"{part}.use_rslora") else 1.0)
