"""Reading PyTorch's pickles as far as they hold tensors, numbers and text alone."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from ipa.trainer.errors import TrainError

REFUSED = (
    "refused, it is damaged, or a pickle that holds more than tensors and would run code when loaded; get or convert "
    "it as .safetensors"
)


def load_pickle(path: Path) -> Any:
    """What a file unpacks to, its tensors on the CPU.

    Tensors of a zip file, as torch writes them since 1.6, are mapped into memory: they cost nothing before they are
    used.

    Raises:
        TrainError: the file is damaged, or holds anything else.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise TrainError(f"{path}: {REFUSED}") from error
    except Exception as error:  # a damaged one may fail anywhere in the readers of zip files and pickles
        raise TrainError(f"{path}: not a readable PyTorch file; it is damaged or of another format") from error
