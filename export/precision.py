"""Half precision as engines take it: the graph itself is typed float16, float32 where half has no room."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

ModuleType = TypeVar("ModuleType", bound=nn.Module)


class InFloat32(nn.Module):
    """A module that computes in float32 whatever the dtype of its input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.float()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The inner module's output, in the input's dtype."""
        result: Tensor = self.inner(hidden_states.float())
        return result.to(hidden_states.dtype)


def to_half(module: ModuleType) -> ModuleType:
    """Turn weights and activations into float16, in place.

    What stays in float32, so that a strongly typed engine keeps it there:

    - group norms: the sum of squares of a group (up to 10 * 64 * 64 values) overflows 65504;
    - the sinusoids of the timestep, whose argument reaches 999 (diffusers computes them from the float32 timestep);
    - statistics of layer norms (`LayerNormalization` has them in float32 by `stash_type`);
    - attention scores of models with `upcast_attention`.
    """
    module.half()
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(parent, name, InFloat32(child))
    return module
