"""LPIPS from files on this machine: AlexNet's weights are the user's, those of the distance come with torchmetrics.

torchmetrics' own class cannot do it: it needs torchvision and downloads AlexNet.
"""

from __future__ import annotations

import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ipa.benchmarks.quality_models import torch_device
from ipa.engines.bundle import hash_file
from ipa.engines.errors import IpaError, first_line
from ipa.runtime.image_files import open_image

_LAYERS = (1, 4, 7, 9, 11)  # of the features: after each ReLU
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation for -1 to 1
_SMALL = 1e-8


def alexnet_features() -> nn.Sequential:
    """AlexNet's convolutions, numbered as torchvision's. Source: arXiv:1404.5997."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


class Lpips:
    """How far apart two pictures look. Source: arXiv:1801.03924, formula (1)."""

    def __init__(self, file: Path) -> None:
        """Load it.

        Args:
            file: AlexNet's weights as torchvision has them, `alexnet-owt-7be5be79.pth`.
        Raises:
            IpaError: they are no such weights.
        """
        state = _read(file)
        self._features = alexnet_features().eval()
        try:
            convolutions = {name: weight for name, weight in state.items() if name.startswith("features.")}
            self._features.load_state_dict({name.removeprefix("features."): w for name, w in convolutions.items()})
        except (RuntimeError, AttributeError, TypeError) as error:
            raise IpaError(f"--lpips {file}: has not AlexNet's convolutions as torchvision names them") from error
        self._device = torch_device()
        self._features.to(self._device)
        self._weights = [weight.to(self._device) for weight in _linear()]
        self.title, self.sha256 = str(file), hash_file(file)

    @torch.inference_mode()
    def __call__(self, first: Path, second: Path) -> float:
        """Of two pictures of one size; 0: they look the same."""
        total = torch.zeros((), device=self._device)
        for one, other, weight in zip(self._seen(first), self._seen(second), self._weights, strict=True):
            total += nn.functional.conv2d((one - other) ** 2, weight).mean()
        return float(total)

    def _seen(self, file: Path) -> list[Tensor]:
        """Unit vectors at every place of every layer."""
        image = torch.from_numpy(np.array(open_image(file))).to(self._device)
        pixels = image.permute(2, 0, 1)[None].float() / 127.5 - 1
        shift, scale = (torch.tensor(values, device=self._device).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
        hidden, seen = (pixels - shift) / scale, []
        for index, layer in enumerate(self._features):
            hidden = layer(hidden)
            if index in _LAYERS:
                seen.append(hidden / torch.sqrt(_SMALL + (hidden**2).sum(dim=1, keepdim=True)))
        return seen


def _linear() -> list[Tensor]:
    """The weights of the distance, a layer each, from torchmetrics' files.

    It is looked for, not imported: see `inception_obstacle`.
    """
    found = find_spec("torchmetrics")
    if found is None or found.origin is None:
        raise IpaError(
            "--lpips needs torchmetrics, which brings the weights of the distance: `pip install torchmetrics`"
        )
    file = Path(found.origin).parent / "functional" / "image" / "lpips_models" / "alex.pth"
    state = _read(file)
    try:
        return [state[f"lin{index}.model.1.weight"] for index in range(len(_LAYERS))]
    except (KeyError, TypeError) as error:
        raise IpaError(f"--lpips: {file} has not the weights of the distance; install torchmetrics again") from error


def _read(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise IpaError(f"--lpips {file}: cannot be read as weights: {first_line(error)}") from error
