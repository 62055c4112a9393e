"""Figures of quality against transformers, torchmetrics and closed forms."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics.functional.image.lpips as torchmetrics_lpips
import torchmetrics.image.fid
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_eyes import Extractor, picture, stand_in_for_inception, tiny_clip, tiny_dino
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from ipa.benchmarks import quality_lpips, quality_models
from ipa.benchmarks.quality_eye import Eye
from ipa.benchmarks.quality_lpips import Lpips, alexnet_features
from ipa.benchmarks.quality_metrics import cosine, fid, frechet_distance, median_of_medians, psnr, similarity
from ipa.benchmarks.quality_models import Clip, Dino, Inception, inception_obstacle
from ipa.engines.errors import IpaError


def test_clip_i_and_clip_t_are_those_of_transformers(tmp_path: Path) -> None:
    model = tiny_clip(tmp_path)
    pictures, texts = [picture(i, 30 + 9 * i, 50) for i in range(3)], ["a cat", "a red dog on the grass", "zebra"]
    pixels = CLIPImageProcessorPil.from_pretrained(tmp_path)(pictures, return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(tmp_path)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**pixels, **tokens)
    scale = float(model.logit_scale.detach().exp())
    expected_t = theirs.logits_per_image / scale
    expected_i = theirs.image_embeds @ theirs.image_embeds.T
    clip = Clip(tmp_path)
    seen, read = [clip.image(one) for one in pictures], [clip.text(one) for one in texts]
    for i in range(3):
        for j in range(3):  # float32, and they batch and pad
            assert cosine(seen[i], read[j]) == pytest.approx(float(expected_t[i, j]), abs=1e-5)
            assert cosine(seen[i], seen[j]) == pytest.approx(float(expected_i[i, j]), abs=1e-5)
    assert np.isfinite(clip.text("a cat " * 200)).all()


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_dino_is_the_class_token(kind: str, tmp_path: Path) -> None:
    model = tiny_dino(tmp_path, kind)
    pixels = CLIPImageProcessorPil.from_pretrained(tmp_path)([picture(0)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixels).last_hidden_state[0, 0].numpy()
    np.testing.assert_allclose(Dino(tmp_path).image(picture(0)), expected, atol=1e-5)


def test_weights_in_half_precision_are_computed_with_in_float32(tmp_path: Path) -> None:
    tiny_clip(tmp_path).half().save_pretrained(tmp_path)
    model = CLIPModel.from_pretrained(tmp_path, dtype=torch.float32)
    pixels = CLIPImageProcessorPil.from_pretrained(tmp_path)([picture(0)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(pixels).pooler_output)[0].numpy()
    np.testing.assert_allclose(Clip(tmp_path).image(picture(0)), expected, rtol=0, atol=1e-6)  # float16 is 1e-3 off


def test_models_of_another_kind_or_without_weights_are_refused(tmp_path: Path) -> None:
    clip, dino, cut = tmp_path / "clip", tmp_path / "dino", tmp_path / "cut"
    tiny_clip(clip), tiny_dino(dino), tiny_clip(cut)
    with pytest.raises(IpaError, match=r"--clip .*dino: its config\.json says model_type 'vit', expected clip"):
        Clip(dino)
    with pytest.raises(IpaError, match="model_type 'clip', expected vit or dinov2"):
        Dino(clip)
    with pytest.raises(IpaError, match=r"nowhere: has no readable config\.json"):
        Clip(tmp_path / "nowhere")
    weights = load_file(cut / "model.safetensors")
    del weights["text_projection.weight"]  # transformers would draw another at random
    save_file(weights, cut / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IpaError, match=r"1 weights are missing, such as text_projection\.weight"):
        Clip(cut)


def test_similarity_resamples_image_prompts() -> None:
    rng = np.random.default_rng(0)
    others = list(rng.normal(size=(20, 6)).astype(np.float32))
    drawn = [[other + rng.normal(size=6).astype(np.float32)] for other in others]
    once, often = similarity(drawn, others), similarity([samples * 4 for samples in drawn], others)
    first, second = (torch.from_numpy(np.stack(vectors)) for vectors in ([one for (one,) in drawn], others))
    assert once.value == pytest.approx(float(torch.cosine_similarity(first, second).mean()), abs=1e-6)
    # Four equal samples of each tell nothing new: the interval stays as wide as it is.
    assert (often.value, often.low, often.high, often.count) == pytest.approx((once.value, once.low, once.high, 20))
    assert once.low < once.value < once.high


def gaussian(mean: np.ndarray, covariance: np.ndarray, count: int = 200, seed: int = 0) -> np.ndarray:
    """Points with exactly that mean and covariance."""
    points = np.random.default_rng(seed).normal(size=(count, len(mean)))
    points -= points.mean(axis=0)
    white = points @ np.linalg.inv(np.linalg.cholesky(np.cov(points.T))).T
    return (white @ np.linalg.cholesky(covariance).T + mean).astype(np.float64)


def test_frechet_distance_is_the_closed_form() -> None:
    first, second = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.0])
    a, b = np.array([4.0, 1.0, 0.25]), np.array([1.0, 9.0, 0.25])
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    x, y = (gaussian(m, turn @ np.diag(v) @ turn.T, seed=i) for i, (m, v) in enumerate(((first, a), (second, b))))
    # Covariances with common axes: |m - n|^2 + sum (sqrt a - sqrt b)^2.
    expected = ((first - second) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-9)
    # Turned against each other: the trace of the root of S^1/2 T S^1/2, another way than torchmetrics'.
    other = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    s, t = turn @ np.diag(a) @ turn.T, other @ np.diag(b) @ other.T
    root = turn @ np.diag(np.sqrt(a)) @ turn.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ t @ root)).sum()
    z = gaussian(second, t, seed=3)
    expected = ((first - second) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * cross
    assert frechet_distance(x, z) == pytest.approx(expected, rel=1e-9)


@pytest.fixture
def tiny_inception(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A weights file, with `Extractor` for the network."""
    return stand_in_for_inception(monkeypatch, tmp_path)


def test_fid_is_torchmetrics_of_the_same_pictures(tiny_inception: Path) -> None:
    real, drawn = [picture(i) for i in range(12)], [[picture(50 + i), picture(90 + i)] for i in range(12)]
    metric = torchmetrics.image.fid.FrechetInceptionDistance(Extractor())
    for images, is_real in ((real, True), ([one for two in drawn for one in two], False)):
        metric.update(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), real=is_real)
    inception = Inception(tiny_inception)
    figure = fid([list(map(inception.image, two)) for two in drawn], list(map(inception.image, real)))
    assert figure.value == pytest.approx(float(metric.compute()), rel=1e-4)  # the features are float32
    assert figure.low < figure.value < figure.high and figure.count == 12


def test_what_is_in_the_way_of_fid_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.delitem(sys.modules, "torch_fidelity")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torch_fidelity.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    assert "installed but cannot be imported (operator torchvision::nms does not exist)" in inception_obstacle()
    (tmp_path / "torch_fidelity.py").write_text("")
    assert inception_obstacle() == ""
    monkeypatch.setattr(quality_models, "find_spec", lambda name: None)
    assert inception_obstacle() == "torch-fidelity is not installed: `pip install torch-fidelity`"


def test_psnr(tmp_path: Path) -> None:
    grey = np.full((8, 8, 3), 100, np.uint8)
    for name, pixels in (("a", grey), ("b", grey + np.uint8(10)), ("c", grey.copy())):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    assert psnr(tmp_path / "a.png", tmp_path / "b.png") == pytest.approx(20 * np.log10(255 / 10))
    assert psnr(tmp_path / "a.png", tmp_path / "c.png") == math.inf


def test_equal_pictures_do_not_count_for_the_median() -> None:
    found = median_of_medians([[40.0, math.inf], [50.0, 30.0], [math.inf, math.inf], [70.0, 60.0]])
    assert found is not None and (found.value, found.count) == (40.0, 3)
    assert median_of_medians([[math.inf], [math.inf]]) is None


def test_lpips_is_torchmetrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = alexnet_features()
    weights = {f"features.{name}": weight for name, weight in network.state_dict().items()}
    torch.save({**weights, "classifier.1.weight": torch.zeros(1)}, tmp_path / "alexnet.pth")
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda name, pretrained: network)
    theirs = torchmetrics_lpips._LPIPS(net="alex")
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for number, file in enumerate(files):
        picture(number, 72, 64).save(file)
    one, other = (torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 255 for file in files)
    expected = float(theirs(one, other, normalize=True))
    assert expected > 0.01
    lpips = Lpips(tmp_path / "alexnet.pth")
    assert lpips(*files) == pytest.approx(expected, rel=1e-4)
    assert lpips(files[0], files[0]) == 0
    torch.save(weights | {"features.0.bias": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"zzz")
    for name, message in (("other", "has not AlexNet's convolutions"), ("broken", "cannot be read as weights")):
        with pytest.raises(IpaError, match=message):
            Lpips(tmp_path / f"{name}.pth")
    monkeypatch.setattr(quality_lpips, "find_spec", lambda name: None)
    with pytest.raises(IpaError, match=r"--lpips needs torchmetrics.*`pip install torchmetrics`"):
        Lpips(tmp_path / "alexnet.pth")


def test_an_eye_looks_once(tmp_path: Path) -> None:
    class Counting:
        title, sha256, looks = "", "0" * 64, 0

        def image(self, image: Image.Image) -> np.ndarray:
            self.looks += 1
            return np.asarray(image, np.float32).mean(axis=(0, 1))

    model, files = Counting(), [tmp_path / "1.png", tmp_path / "2.png"]
    for number, file in enumerate(files):
        picture(number).save(file)
    for _ in range(2):
        with Eye(model, tmp_path / "eyes") as eye:
            seen = [eye.picture(file) for file in files]
    assert model.looks == 2 and [one.shape for one in seen] == [(3,), (3,)]
    picture(7).save(files[0])  # another picture under the same name
    with Eye(model, tmp_path / "eyes") as eye:
        assert not np.array_equal(eye.picture(files[0]), seen[0]) and np.array_equal(eye.picture(files[1]), seen[1])
    assert model.looks == 3
    (kept,) = (tmp_path / "eyes").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])  # cut off
    with Eye(model, tmp_path / "eyes") as eye:
        assert np.array_equal(eye.picture(files[1]), seen[1]) and model.looks == 4
