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
        torchmetrics = find_spec("torchmetrics")  # looked for, not imported: see `inception_obstacle`
        assert torchmetrics is not None and torchmetrics.origin is not None
        linear = _read(Path(torchmetrics.origin).parent / "functional" / "image" / "lpips_models" / "alex.pth")
        self._weights = [linear[f"lin{index}.model.1.weight"] for index in range(len(_LAYERS))]
        self.title = str(file)

    @torch.inference_mode()
    def __call__(self, first: Path, second: Path) -> float:
        """Of two pictures of one size; 0: they look the same."""
        total = torch.zeros(())
        for one, other, weight in zip(self._seen(first), self._seen(second), self._weights, strict=True):
            total += nn.functional.conv2d((one - other) ** 2, weight).mean()
        return float(total)

    def _seen(self, file: Path) -> list[Tensor]:
        """Unit vectors at every place of every layer."""
        pixels = torch.from_numpy(np.array(open_image(file))).permute(2, 0, 1)[None].float() / 127.5 - 1
        shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
        hidden, seen = (pixels - shift) / scale, []
        for index, layer in enumerate(self._features):
            hidden = layer(hidden)
            if index in _LAYERS:
                seen.append(hidden / torch.sqrt(_SMALL + (hidden**2).sum(dim=1, keepdim=True)))
        return seen


def _read(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise IpaError(f"--lpips {file}: cannot be read as weights: {first_line(error)}") from error
