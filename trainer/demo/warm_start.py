"""A first guess of the adapter: image tokens that imitate the text states of a caption naming what the image shows.

The adapter's keys and values start as copies of the text's, so such tokens already mean something
to the UNet. Training on images then goes on from there, and takes a fraction of the time.
"""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import CLIPVisionModelWithProjection

from ipa.trainer.demo.clip import CLASSES, normalized, preprocess_all
from ipa.trainer.demo.dataset import Dataset
from ipa.trainer.demo.models import WIDTH
from ipa.trainer.demo.unet import UNetData
from ipa.trainer.model import AdapterModel
from ipa.trainer.weights import save_adapter

IMAGES = 3_000
STEPS = 400
LEARNING_RATE = 1e-2
# In "a striped red star on a blue background", counted from the start token: the foreground's and
# the background's words, the end token, and padding, which has seen the whole caption.
POSITIONS = (3, 7, 9, 30)


@torch.no_grad()
def token_targets(data: UNetData, attributes: Tensor) -> Tensor:
    """What the image tokens should be: (n, 4, 128) states of full captions, averaged over all shapes.

    Args:
        attributes: (n, 4) of the images.
    """
    total = torch.zeros(len(attributes), len(POSITIONS), WIDTH)
    for shape in range(CLASSES[0]):
        named = attributes.clone()
        named[:, 0] = shape
        total += data.text_states[(named * data.strides).sum(dim=-1)][:, POSITIONS]
    return total / CLASSES[0]


def warm_start(
    folder: Path,
    dataset: Dataset,
    data: UNetData,
    unet: UNet2DConditionModel,
    image_encoder: CLIPVisionModelWithProjection,
    seed: int = 0,
) -> Path:
    """Fit the projection alone to `token_targets` and write the adapter into `folder`; its file."""
    torch.manual_seed(seed)
    count = min(IMAGES, len(dataset))
    targets = token_targets(data, torch.from_numpy(dataset.attributes[:count]))
    with torch.no_grad():
        pixel_values = normalized(preprocess_all(dataset.images[:count]))
        embeds = torch.cat([image_encoder(part).image_embeds for part in torch.split(pixel_values, 100)])
    adapter = AdapterModel(unet, WIDTH, len(POSITIONS))
    optimizer = torch.optim.Adam(adapter.image_proj.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        loss = mse_loss(adapter.image_proj(embeds), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter({name: weight.detach() for name, weight in adapter.named_weights().items()}, folder)
    adapter.eject()
    return folder / "ip_adapter.safetensors"
