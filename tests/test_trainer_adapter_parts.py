"""The pieces of adapter training: attention, weight files, options."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from ipa.trainer.attention import cross_attention_layers, eject, inject
from ipa.trainer.ema import MovingAverage
from ipa.trainer.errors import TrainError
from ipa.trainer.model import AdapterModel
from ipa.trainer.options import AdapterOptions
from ipa.trainer.weights import cpu_copies, load_adapter, save_adapter

EMBED, CROSS, TOKENS = 40, 48, 77


def options(**changed: Any) -> AdapterOptions:
    fields: dict[str, Any] = {name: Path("x") for name in ("data", "image_root", "output")}
    return AdapterOptions(**({"base": "b", "image_encoder": "e", "steps": 10} | fields | changed))


@pytest.fixture
def unet(tiny_base: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet").requires_grad_(False).eval()


# --- attention ---


def test_layers_come_in_file_order(unet: Any) -> None:
    names = [name for name, _ in cross_attention_layers(unet)]
    assert len(names) == 16
    assert names[0] == "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    assert names[6].startswith("up_blocks.1.") and names[-1].startswith("mid_block.")
    diffusers_names = [name for name in unet.attn_processors if "attn2" in name]
    assert [f"{name}.processor" for name in names] == diffusers_names
    assert list(unet.attn_processors).index(diffusers_names[3]) == 7  # file key 2 * 3 + 1


def test_eject_restores_the_unet_exactly(unet: Any) -> None:
    sample, states = torch.randn(1, 4, 8, 8), torch.randn(1, TOKENS, CROSS)
    before, keys = unet(sample, 5, states).sample, list(unet.state_dict())
    processors_before = dict(unet.attn_processors)
    processors, originals = inject(unet)
    assert len(processors) == 16 and list(unet.state_dict()) != keys
    for processor in processors:
        processor.scale = 0.0
    tokens = torch.randn(1, 4, CROSS)
    off = unet(sample, 5, states, cross_attention_kwargs={"ip_hidden_states": tokens}).sample
    torch.testing.assert_close(off, before, rtol=0, atol=1e-6)
    eject(unet, originals)
    assert list(unet.state_dict()) == keys
    assert unet.attn_processors == processors_before
    assert torch.equal(unet(sample, 5, states).sample, before)


def test_text_mask_leaves_the_image_alone(unet: Any) -> None:
    """A masked text token has no influence; diffusers prepares the mask itself."""
    model = AdapterModel(unet, EMBED, 4)
    sample, states, tokens = torch.randn(2, 4, 8, 8), torch.randn(2, TOKENS, CROSS), torch.randn(2, 4, CROSS)
    mask = torch.ones(2, TOKENS)
    mask[:, 40:] = 0
    changed = states.clone()
    changed[:, 40:] += 3
    outputs = [
        unet(
            sample,
            5,
            text,
            encoder_attention_mask=mask,
            cross_attention_kwargs={"ip_hidden_states": tokens},
        ).sample
        for text in (states, changed)
    ]
    assert torch.equal(*outputs)
    model.eject()


def test_without_cross_attention_there_is_nothing_to_train() -> None:
    with pytest.raises(TrainError, match="no cross-attention"):
        inject(torch.nn.Module())


def test_training_lowers_the_loss_and_moves_only_the_adapter(unet: Any) -> None:
    base_before = copy.deepcopy(unet.state_dict())
    torch.manual_seed(0)
    model = AdapterModel(unet, EMBED, 4)
    start = cpu_copies(model.named_weights())
    layer = cross_attention_layers(unet)[0][1]
    assert torch.equal(start["ip_adapter.1.to_k_ip.weight"], layer.to_k.weight)
    optimizer = torch.optim.AdamW(model.adapter_parameters(), lr=3e-3)
    inputs = torch.randn(4, 4, 8, 8), torch.tensor([10, 300, 600, 900]), torch.randn(4, TOKENS, CROSS)
    embeds, target = torch.randn(4, EMBED), torch.randn(4, 4, 8, 8)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.mse_loss(model(*inputs, embeds), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    weights = model.named_weights()
    assert len(weights) == 4 + 2 * 16 == len(model.adapter_parameters())
    assert all(not torch.equal(weights[name], start[name]) for name in weights)
    model.eject()
    assert all(torch.equal(tensor, base_before[name]) for name, tensor in unet.state_dict().items())


# --- weight files ---


def test_both_files_hold_the_same_and_load_again(unet: Any, tmp_path: Path) -> None:
    model = AdapterModel(unet, EMBED, 4)
    flat, nested = save_adapter(cpu_copies(model.named_weights()), tmp_path)
    one, two = load_adapter(flat), load_adapter(nested)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert set(torch.load(nested, weights_only=True)) == {"image_proj", "ip_adapter"}
    ip_keys = {int(name.split(".")[1]) for name in one if name.startswith("ip_adapter.")}
    assert ip_keys == set(range(1, 32, 2))
    assert one["image_proj.proj.weight"].shape == (4 * CROSS, EMBED)
    other = AdapterModel(copy.deepcopy(_ejected(model)), EMBED, 4)
    other.load_adapter_state_dict(two, "file")
    assert all(torch.equal(tensor, one[name]) for name, tensor in other.named_weights().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ip_adapter.bin", "ip_adapter.safetensors"]


def _ejected(model: AdapterModel) -> Any:
    model.eject()
    return model.unet


class Payload:
    """A pickle that would run a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_files_that_are_no_adapters_are_refused(tmp_path: Path) -> None:
    def refused(name: str, message: str) -> None:
        with pytest.raises(TrainError, match=message):
            load_adapter(tmp_path / name)

    torch.save({"image_proj": Payload(tmp_path / "owned")}, tmp_path / "evil.bin")
    refused("evil.bin", "refused")
    assert not (tmp_path / "owned").exists()
    (tmp_path / "noise.bin").write_bytes(b"\x80\x02garbage")
    refused("noise.bin", "damaged")
    (tmp_path / "empty.bin").touch()
    refused("empty.bin", "not a readable PyTorch file")
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 50)
    refused("noise.safetensors", "not a readable safetensors file")
    refused("missing.bin", "no such adapter file")
    (tmp_path / "x.ckpt").touch()
    refused("x.ckpt", "end in .safetensors or .bin")
    torch.save({"unet": {}}, tmp_path / "lora.bin")
    refused("lora.bin", "expected the groups")
    torch.save({"image_proj": {"proj.weight": 3}, "ip_adapter": {}}, tmp_path / "number.bin")
    refused("number.bin", "is not a tensor")
    torch.save([torch.zeros(2)], tmp_path / "list.bin")
    refused("list.bin", "expected the groups")
    save_file({"image_proj.x": torch.zeros(2)}, tmp_path / "half.safetensors")
    refused("half.safetensors", "no 'ip_adapter' weights")
    save_file(
        {"image_proj.x": torch.full((2,), math.nan), "ip_adapter.x": torch.zeros(1)}, tmp_path / "nan.safetensors"
    )
    refused("nan.safetensors", "not finite")


def test_an_adapter_of_another_width_is_refused(unet: Any, tmp_path: Path, tiny_adapter_file: Path) -> None:
    model = AdapterModel(unet, EMBED, 4)
    weights = load_file(tiny_adapter_file)
    model.load_adapter_state_dict(weights, "f")
    with pytest.raises(TrainError, match="1 tensors missing"):
        model.load_adapter_state_dict({k: v for k, v in weights.items() if k != "ip_adapter.31.to_v_ip.weight"}, "f")
    with pytest.raises(TrainError, match=r"f: ip_adapter\.1\.to_k_ip\.weight is \(24, 2048\), expected \(24, 48\)"):
        model.load_adapter_state_dict(weights | {"ip_adapter.1.to_k_ip.weight": torch.zeros(24, 2048)}, "f")


# --- options, average ---


def test_learning_rate_schedules() -> None:
    assert [options(learning_rate=1.0).learning_rate_at(step) for step in (0, 9)] == [1.0, 1.0]
    cosine = options(learning_rate=1.0, lr_scheduler="cosine", lr_warmup_steps=4, steps=14)
    assert [cosine.learning_rate_at(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert cosine.learning_rate_at(4) == 1.0
    assert cosine.learning_rate_at(9) == pytest.approx(0.5)
    assert 0 < cosine.learning_rate_at(13) < 0.03


def test_moving_average() -> None:
    average = MovingAverage({"w": torch.zeros(1)}, decay=0.9)
    expected = 0.0
    for step in range(1, 200):
        average.update({"w": torch.ones(1)}, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay)
        assert average.weights["w"].item() == pytest.approx(expected, abs=1e-6)
