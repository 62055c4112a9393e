"""The adapter's first guess: tokens that say what the image shows."""

import torch

from ipa.trainer.demo import warm_start as module
from ipa.trainer.demo.clip import normalized, preprocess_all
from ipa.trainer.demo.dataset import draw_dataset
from ipa.trainer.demo.models import WIDTH, build_image_encoder, build_unet
from ipa.trainer.demo.unet import UNetData
from ipa.trainer.demo.warm_start import POSITIONS, token_targets, warm_start
from ipa.trainer.model import AdapterModel
from ipa.trainer.weights import load_adapter

STRIDES = torch.tensor([9 * 9 * 4, 9 * 4, 4, 1])


def _data():
    torch.manual_seed(0)
    return UNetData(torch.zeros(1), torch.zeros(1), torch.randn(8 * 9 * 9 * 4 + 1, 77, WIDTH), STRIDES)


def test_targets_depend_on_everything_but_the_shape():
    star, ring, other = torch.tensor([[3, 0, 4, 1], [4, 0, 4, 1], [3, 0, 5, 1]])
    targets = token_targets(_data(), torch.stack([star, ring, other]))
    assert targets.shape == (3, len(POSITIONS), WIDTH)
    assert torch.equal(targets[0], targets[1])
    assert not torch.equal(targets[0], targets[2])


def test_the_fitted_tokens_come_nearer_and_the_attention_weights_stay_the_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 60)
    dataset, data = draw_dataset(24, seed=1), _data()
    torch.manual_seed(0)
    encoder, unet = build_image_encoder().eval(), build_unet()
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    path = warm_start(tmp_path, dataset, data, unet, encoder)
    adapter = AdapterModel(unet, WIDTH, len(POSITIONS))
    targets = token_targets(data, torch.from_numpy(dataset.attributes))
    with torch.no_grad():
        embeds = encoder(normalized(preprocess_all(dataset.images))).image_embeds
        untrained = (adapter.image_proj(embeds) - targets).square().mean()
        adapter.load_adapter_state_dict(load_adapter(path), str(path))
        assert (adapter.image_proj(embeds) - targets).square().mean() < 0.5 * untrained
    first = next(iter(adapter.processors))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(first.to_k_ip.weight, before[name])
    adapter.eject()
    assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())
