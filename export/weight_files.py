"""Reading weight files that others made: safetensors, and PyTorch's pickles as far as they hold tensors alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ipa.engines.errors import IpaError
from ipa.trainer.errors import TrainError
from ipa.trainer.pickles import load_pickle

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLES)


def check_file(path: Path, what: str) -> None:
    """Refuse what is no weight file.

    Raises:
        IpaError: the file is missing, or its suffix is none of `SUFFIXES`.
    """
    if not path.is_file():
        raise IpaError(f"{what} {path}: no such file")
    if path.suffix not in SUFFIXES:
        raise IpaError(f"{what} {path}: weight files end in {', '.join(SUFFIXES)}")


def read_weights(path: Path, what: str) -> Any:
    """What a file holds: tensors by name, or what a pickle of tensors, numbers and text unpacks to.

    Args:
        what: the file's part, for messages.
    Raises:
        IpaError: the file is missing or damaged, or would run code when loaded.
    """
    check_file(path, what)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise damaged(path, what) from error
    try:
        return load_pickle(path)
    except TrainError as error:
        raise IpaError(f"{what} {error}") from error


def named_tensors(weights: Any, path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of `read_weights`, by name; training checkpoints keep them under `state_dict`.

    Raises:
        IpaError: there are none.
    """
    while isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    tensors = weights.items() if isinstance(weights, dict) else ()
    found = {name: value for name, value in tensors if isinstance(name, str) and isinstance(value, Tensor)}
    if not found:
        raise IpaError(f"{what} {path}: holds no named tensors")
    return found


def damaged(path: Path, what: str) -> IpaError:
    """The error for a file that cannot be read."""
    return IpaError(f"{what} {path}: not readable; it is damaged, or not what its suffix says")
