"""Stage 2: a CLIP pair. Its text states condition the UNet, its image embeddings the adapter."""

from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPImageProcessor, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from ipa.trainer.demo.dataset import Dataset
from ipa.trainer.demo.loop import Budget, Optimisation, fit
from ipa.trainer.demo.models import VISION_SIZE, WIDTH, build_image_encoder, build_text_encoder
from ipa.trainer.demo.shapes import COLOURS, SHAPES, TEXTURES, Scene, describe

BATCH = 56
TEXT_LENGTH = 16  # the longest caption has 11 tokens; causal attention makes the rest irrelevant here
CLASSES = (len(SHAPES), len(COLOURS), len(COLOURS), len(TEXTURES))  # shape, foreground, background, texture
IMAGE_WEIGHTS = (0.5, 1.0, 1.0, 0.5)  # colours weigh most: the adapter sees the image embedding alone
TEXT_WEIGHT = 0.25
NAMED = (0.7, 0.7, 0.6)  # how often a caption names foreground, background and texture
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipPair(nn.Module):
    """Both towers, the temperature, and linear heads that read the attributes off the embeddings."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text = build_text_encoder(tokenizer)
        self.image = build_image_encoder()
        self.logit_scale = nn.Parameter(torch.tensor(2.66))  # log(1 / 0.07), CLIP's own start
        self.image_heads = nn.ModuleList(nn.Linear(WIDTH, classes) for classes in CLASSES)
        self.text_heads = nn.ModuleList(nn.Linear(WIDTH, classes + 1) for classes in CLASSES)  # last: not named

    def loss(self, pixel_values: Tensor, input_ids: Tensor, shown: Tensor, named: Tensor) -> Tensor:
        """Contrastive loss and attribute losses of a batch.

        Args:
            shown: (n, 4) attributes of the images.
            named: (n, 4) attributes of the captions; the class count where an attribute is not named.
        """
        with torch.autocast("cpu", torch.bfloat16):
            image = self.image(pixel_values).image_embeds.float()
            text = self.text(input_ids).text_embeds.float()
        logits = self.logit_scale.exp().clamp(max=100) * normalize(image) @ normalize(text).T
        logits = logits.masked_fill(compatible(shown, named) & ~torch.eye(len(logits), dtype=torch.bool), -1e4)
        pairs = torch.arange(len(logits))
        total = (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2
        for column, weight in enumerate(IMAGE_WEIGHTS):
            total = total + weight * cross_entropy(self.image_heads[column](image), shown[:, column])
            total = total + TEXT_WEIGHT * cross_entropy(self.text_heads[column](text), named[:, column])
        return total


def compatible(shown: Tensor, named: Tensor) -> Tensor:
    """(images, captions) bool: whether a caption is true of an image, so that it is no negative for it."""
    unnamed = named == torch.tensor(CLASSES)
    return ((shown[:, None] == named[None]) | unnamed[None]).all(dim=-1)


def train_clip(
    dataset: Dataset, tokenizer: CLIPTokenizer, budget: Budget, checkpoint: Path, seed: int = 0
) -> tuple[CLIPTextModelWithProjection, CLIPVisionModelWithProjection]:
    """Train both towers on the drawn images; the text tower and the image tower."""
    torch.manual_seed(seed)
    pair = ClipPair(tokenizer)
    pixels = preprocess_all(dataset.images)
    attributes = torch.from_numpy(dataset.attributes)
    captions = CaptionTable(tokenizer)

    def loss(step: int, progress: float) -> Tensor:
        indices = torch.randint(len(pixels), (BATCH,))
        shown = attributes[indices]
        hidden = torch.rand(BATCH, 3) >= torch.tensor(NAMED)
        named = shown.clone()
        named[:, 1:] = torch.where(hidden, torch.tensor(CLASSES[1:]), named[:, 1:])
        return pair.loss(normalized(pixels[indices]), captions.input_ids[captions.rows(named)], shown, named)

    optimisation = Optimisation(learning_rate=1e-3, betas=(0.9, 0.98), weight_decay=0.05, ema_decay=0.99)
    fit(pair, loss, optimisation, budget, checkpoint=checkpoint, batch_size=BATCH, seed=seed)
    return pair.text, pair.image


class CaptionTable:
    """Every caption there is, numbered by the attributes it names."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        sizes = (CLASSES[0], *(classes + 1 for classes in CLASSES[1:]))
        self.texts = [_text(*choice) for choice in product(*map(range, sizes))]
        self.strides = torch.tensor([int(np.prod(sizes[column + 1 :])) for column in range(4)])
        tokens = tokenizer(self.texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True)
        self.input_ids = torch.tensor(tokens["input_ids"])

    def rows(self, named: Tensor) -> Tensor:
        """The row of each caption; an attribute that equals its class count is not named."""
        return (named * self.strides).sum(dim=-1)


def _text(shape: int, foreground: int, background: int, texture: int) -> str:
    names = [(*COLOURS, "")[foreground], (*COLOURS, "")[background], (*TEXTURES, "")[texture]]
    scene = Scene(SHAPES[shape], names[0], names[1], names[2])
    return describe(scene, texture=bool(names[2]), foreground=bool(names[0]), background=bool(names[1]))


def build_image_processor() -> CLIPImageProcessor:
    """CLIP's preprocessing at this encoder's size."""
    return CLIPImageProcessor(
        size={"shortest_edge": VISION_SIZE}, crop_size={"height": VISION_SIZE, "width": VISION_SIZE}
    )


def preprocess_all(images: np.ndarray) -> Tensor:
    """(n, 128, 128, 3) uint8 resized as CLIP does it, (n, 3, 64, 64) uint8."""
    size = (VISION_SIZE, VISION_SIZE)
    small = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).contiguous()


def normalized(pixels: Tensor) -> Tensor:
    """uint8 pixels as CLIP's `pixel_values`."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels.float() / 255 - mean) / std
