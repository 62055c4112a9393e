"""The shared training loop: schedules, resuming, averages."""

import math

import pytest
import torch
from torch import nn

from ipa.trainer.demo import loop
from ipa.trainer.demo.loop import Budget, Optimisation, fit, load_averaged

OPTIMISATION = Optimisation(learning_rate=0.05, warmup_steps=4, ema_decay=0.9)


class _InterruptedError(Exception):
    pass


def _model():
    torch.manual_seed(0)
    return nn.Linear(4, 1)


def _fit(path, steps=20, stop_at=None, seed=0):
    model = _model()

    def loss(step, progress):
        if step == stop_at:
            raise _InterruptedError
        x = torch.randn(8, 4)
        return (model(x) - x.sum(dim=1, keepdim=True)).square().mean()

    return fit(model, loss, OPTIMISATION, Budget(steps), checkpoint=path, batch_size=8, seed=seed)


def test_training_learns_and_is_reproducible(tmp_path):
    before = (_model().weight - 1).abs().max()
    first, again = _fit(tmp_path / "a.ckpt", steps=100), _fit(tmp_path / "b.ckpt", steps=100)
    assert (first.weight - 1).abs().max() < 0.2 * before
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, _fit(tmp_path / "c.ckpt", steps=100, seed=1).weight)


def test_an_interrupted_training_ends_where_an_unbroken_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    unbroken = _fit(tmp_path / "unbroken.ckpt")
    with pytest.raises(_InterruptedError):
        _fit(tmp_path / "broken.ckpt", stop_at=11)
    resumed = _fit(tmp_path / "broken.ckpt")
    assert torch.equal(resumed.weight, unbroken.weight)


def test_a_finished_training_is_not_trained_again(tmp_path):
    done = _fit(tmp_path / "a.ckpt")
    again = _fit(tmp_path / "a.ckpt", stop_at=20)
    assert torch.equal(done.weight, again.weight)


def test_a_checkpoint_gives_the_averaged_weights(tmp_path):
    trained = _fit(tmp_path / "a.ckpt")
    looked_at = load_averaged(_model(), tmp_path / "a.ckpt")
    last = torch.load(tmp_path / "a.ckpt", weights_only=True)["model"]["weight"]
    assert torch.equal(looked_at.weight, trained.weight)
    assert not torch.equal(last, trained.weight)


def test_a_budget_ends_at_whichever_limit_comes_first():
    assert Budget(10).progress(5, seconds=1e9) == 0.5
    assert Budget(10, minutes=2).progress(1, seconds=90) == 0.75
    assert Budget(10, minutes=2).progress(9, seconds=0) == 0.9
    assert Budget(10, minutes=2).progress(0, seconds=500) == 1.0


def test_minutes_end_a_training_early(tmp_path):
    model = _model()
    steps = []

    def loss(step, progress):
        steps.append(progress)
        return model(torch.ones(1, 4)).square().mean()

    fit(model, loss, OPTIMISATION, Budget(10**9, minutes=0.2 / 60), checkpoint=tmp_path / "a.ckpt", batch_size=1)
    assert steps == sorted(steps) and 0.5 < steps[-1] < 1


def test_the_rate_warms_up_and_decays_to_nothing():
    assert OPTIMISATION.rate(0, 0.0) == pytest.approx(0.05 / 4)
    assert OPTIMISATION.rate(10, 0.5) == pytest.approx(0.05 * (1 + math.cos(math.pi / 2)) / 2)
    assert OPTIMISATION.rate(10, 1.0) == pytest.approx(0.0)
