"""Adapter files in the official layout: nested ``.bin``, flat ``.safetensors``.

Keys are ``image_proj.{proj,norm}.{weight,bias}`` and ``ip_adapter.N.to_{k,v}_ip.weight``, where N = 1, 3, 5, ... is the
layer's place among all attention processors (self-attention has the even ones).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ipa.trainer.errors import TrainError
from ipa.trainer.files import atomic_path
from ipa.trainer.pickles import load_pickle

GROUPS = ("image_proj", "ip_adapter")
StateDict = dict[str, Tensor]


def named_weights(image_proj: nn.Module, processors: nn.ModuleList) -> StateDict:
    """An adapter's weights under their flat file names; the very tensors, without gradients."""
    state = {f"image_proj.{name}": tensor for name, tensor in image_proj.state_dict().items()}
    for layer, processor in enumerate(processors):
        for name, tensor in processor.state_dict().items():
            state[f"ip_adapter.{2 * layer + 1}.{name}"] = tensor
    return state


def cpu_copies(state: StateDict) -> StateDict:
    """Copies that training no longer changes, as files hold them."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def load_adapter_state_dict(state: StateDict, image_proj: nn.Module, processors: nn.ModuleList, source: str) -> None:
    """Put flat weights into the modules.

    Raises:
        TrainError: a name is missing or not expected, or a shape differs; ``source`` names the file.
    """
    expected = named_weights(image_proj, processors)
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise TrainError(
            f"{source}: not a base-kind adapter for this UNet: {len(missing)} tensors missing "
            f"({_some(missing)}), {len(unexpected)} not expected ({_some(unexpected)})"
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise TrainError(
                f"{source}: {name} is {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}; "
                "the adapter belongs to a base model of another width or has another number of tokens"
            )
    with torch.no_grad():
        image_proj.load_state_dict({name: state[f"image_proj.{name}"] for name in image_proj.state_dict()})
        for layer, processor in enumerate(processors):
            prefix = f"ip_adapter.{2 * layer + 1}."
            processor.load_state_dict({name: state[prefix + name] for name in processor.state_dict()})


def save_adapter(state: StateDict, folder: Path) -> tuple[Path, Path]:
    """Write ``ip_adapter.safetensors`` and ``ip_adapter.bin``, each whole or not at all; returns the two paths.

    Raises:
        TrainError: the disk is full or failed.
    """
    flat, nested = folder / "ip_adapter.safetensors", folder / "ip_adapter.bin"
    try:
        with atomic_path(flat) as partial:
            save_file(state, partial, metadata={"format": "pt"})
        with atomic_path(nested) as partial:
            torch.save(_nest(state), partial)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise TrainError(
            f"the adapter could not be written to {folder}, the disk may be full; "
            "make room and run the same command again"
        ) from error
    return flat, nested


def load_adapter(path: Path) -> StateDict:
    """Flat weights of an adapter file, as they are stored (dtypes may be mixed).

    Raises:
        TrainError: the file is missing, damaged, of another layout, or a pickle with anything but tensors in it.
    """
    if not path.is_file():
        raise TrainError(f"{path}: no such adapter file")
    if path.suffix == ".safetensors":
        try:
            state: StateDict = load_file(path)
        except (SafetensorError, OSError) as error:
            raise TrainError(f"{path}: not a readable safetensors file; it is damaged or of another format") from error
    elif path.suffix == ".bin":
        state = _flatten(load_pickle(path), path)
    else:
        raise TrainError(f"{path}: adapter files end in .safetensors or .bin")
    for group in GROUPS:
        if not any(name.startswith(f"{group}.") for name in state):
            raise TrainError(f"{path}: has no {group!r} weights, so it is not an IP-Adapter file")
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise TrainError(f"{path}: {name} holds values that are not finite floating-point numbers")
    return state


def _nest(state: StateDict) -> dict[str, StateDict]:
    return {
        group: {
            name.removeprefix(f"{group}."): tensor for name, tensor in state.items() if name.startswith(f"{group}.")
        }
        for group in GROUPS
    }


def _flatten(nested: Any, path: Path) -> StateDict:
    state: StateDict = {}
    groups = nested.items() if isinstance(nested, dict) else [("?", nested)]
    for group, tensors in groups:
        if group not in GROUPS or not isinstance(tensors, dict):
            raise TrainError(f"{path}: expected the groups image_proj and ip_adapter, found {str(group)[:60]!r}")
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise TrainError(f"{path}: {group}.{name} is not a tensor")
            state[f"{group}.{name}"] = tensor
    return state


def _some(names: list[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "") if names else "none"
