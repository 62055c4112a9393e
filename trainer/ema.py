"""An exponential moving average of the trained weights."""

from __future__ import annotations

import torch

from ipa.trainer.weights import StateDict


class MovingAverage:
    """Averages weights over the optimizer steps; often a little better than the last ones.

    Args:
        weights: where the average starts.
        decay: share of the old average that each step keeps. The first steps keep less, so that the start is forgotten.
    """

    def __init__(self, weights: StateDict, decay: float) -> None:
        self.weights = {name: tensor.clone() for name, tensor in weights.items()}
        self.decay = decay

    @torch.no_grad()
    def update(self, weights: StateDict, step: int) -> None:
        """Take in the weights after optimizer step ``step`` (counted from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.weights.items():
            average.lerp_(weights[name], 1 - decay)

    @torch.no_grad()
    def load(self, weights: StateDict) -> None:
        """Go on from an average that was saved."""
        for name, average in self.weights.items():
            average.copy_(weights[name])
