"""A separate classifier of shape and texture, which says what a generated image shows."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate

from ipa.trainer.demo.dataset import JUDGE_SEED, Dataset, draw_dataset
from ipa.trainer.demo.loop import Budget, Optimisation, fit
from ipa.trainer.demo.shapes import SHAPES, TEXTURES, Pixels
from ipa.trainer.files import atomic_path

SHIPPED = Path(__file__).with_name("judge.safetensors")  # the one that judged the demo model
BATCH = 64
OPTIMISATION = Optimisation(learning_rate=2e-3, weight_decay=0.02, ema_decay=0.99)


class Judge(nn.Module):
    """A small convolutional network on images reduced to 64 pixels. It shares nothing with the pipeline."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 64), (64, 96)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after)]
            layers += [nn.ReLU(), nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(96 * 4 * 4, len(SHAPES) + len(TEXTURES))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of shapes and of textures for (n, 3, 64, 64) pixels in -1 to 1."""
        features = self.features(pixels)
        shapes, textures = self.head(features.flatten(1)).split((len(SHAPES), len(TEXTURES)), dim=1)
        return shapes, textures

    @torch.no_grad()
    def shapes_and_textures(self, images: Pixels) -> list[tuple[str, str]]:
        """What each of (n, 128, 128, 3) uint8 images shows."""
        shapes, textures = (logits.argmax(dim=1).tolist() for logits in self(reduced(images)))
        return [(SHAPES[shape], TEXTURES[texture]) for shape, texture in zip(shapes, textures, strict=True)]


def reduced(images: Pixels) -> Tensor:
    """(n, 128, 128, 3) uint8 as (n, 3, 64, 64) in -1 to 1."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float()
    return avg_pool2d(pixels, 2) / 127.5 - 1


def train_judge(count: int, budget: Budget, checkpoint: Path, workers: int = 1, seed: int = 0) -> tuple[Judge, float]:
    """Train on `count` images of its own seeds; the judge, and its shape accuracy on a tenth kept apart."""
    drawn = draw_dataset(count, JUDGE_SEED, workers)
    pixels, attributes = reduced(drawn.images), torch.from_numpy(drawn.attributes)
    first = count // 10
    torch.manual_seed(seed)
    judge = Judge()

    def loss(step: int, progress: float) -> Tensor:
        indices = torch.randint(first, count, (BATCH,))
        shapes, textures = judge(augmented(pixels[indices]))
        shown = attributes[indices]
        return cross_entropy(shapes, shown[:, 0]) + 0.5 * cross_entropy(textures, shown[:, 3])

    fit(judge, loss, OPTIMISATION, budget, checkpoint=checkpoint, batch_size=BATCH, seed=seed)
    kept = Dataset(drawn.images[:first], drawn.attributes[:first])
    return judge, shape_accuracy(judge, kept)


def augmented(pixels: Tensor) -> Tensor:
    """Blur, noise and colour shifts, so that a generated image is not judged by its grain."""
    n = len(pixels)
    small = interpolate(avg_pool2d(pixels, 2), scale_factor=2.0, mode="bilinear")
    pixels = torch.lerp(pixels, small, torch.rand(n, 1, 1, 1))
    pixels = pixels * (0.8 + 0.3 * torch.rand(n, 3, 1, 1)) + 0.1 * torch.randn(n, 3, 1, 1)
    return pixels + 0.12 * torch.rand(n, 1, 1, 1) * torch.randn_like(pixels)


def shape_accuracy(judge: Judge, drawn: Dataset) -> float:
    """The share of drawn images whose shape the judge names."""
    said = judge.shapes_and_textures(drawn.images)
    return sum(said[i][0] == drawn.scene(i).shape for i in range(len(drawn))) / len(drawn)


def save_judge(judge: Judge, path: Path) -> None:
    """Write the judge's weights."""
    with atomic_path(path) as temporary:
        save_file(judge.state_dict(), temporary)


def load_judge(path: Path) -> Judge:
    """Read a judge that `save_judge` wrote."""
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.eval()
