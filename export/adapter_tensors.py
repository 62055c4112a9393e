"""One group of an adapter file's tensors, read with care: what is missing, unknown or of another shape is named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ipa.engines.errors import IpaError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorGroup:
    """`image_proj` or `ip_adapter` of a file, with the tensors' names in the group."""

    path: Path
    name: str
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, path: Path, name: str, state: Mapping[str, Tensor]) -> TensorGroup:
        """The tensors of `state` whose names start with the group's."""
        prefix = f"{name}."
        inside = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        return cls(path, name, inside)

    def shape(self, name: str, rank: int) -> Shape:
        """A tensor's shape.

        Raises:
            IpaError: there is no such tensor, or it has another rank or no elements.
        """
        if name not in self.tensors:
            raise self._misses(name)
        shape = tuple(self.tensors[name].shape)
        if len(shape) != rank or 0 in shape:
            raise IpaError(
                f"adapter {self.path}: {self.name}.{name} is {shape}, expected {rank} axes, none empty; "
                "the file is damaged: fetch it again"
            )
        return shape

    def expect_names(self, names: Iterable[str]) -> None:
        """Refuse a group without these tensors or with others.

        Raises:
            IpaError: names the first.
        """
        found, expected = set(self.tensors), set(names)
        if missing := expected - found:
            raise self._misses(min(missing))
        if unknown := found - expected:
            raise IpaError(
                f"adapter {self.path} has the unknown {self.name}.{min(unknown)}; the file is of another kind"
            )

    def expect(self, shapes: Mapping[str, Shape]) -> None:
        """Refuse a group that has not these tensors with these shapes.

        Raises:
            IpaError: names the first that differs.
        """
        self.expect_names(shapes)
        for name, shape in shapes.items():
            found = tuple(self.tensors[name].shape)
            if found != shape:
                raise IpaError(
                    f"adapter {self.path}: {self.name}.{name} is {found}, this base model wants {shape}; "
                    "use an adapter made for this base model"
                )

    def _misses(self, name: str) -> IpaError:
        return IpaError(
            f"adapter {self.path} misses {self.name}.{name}; the file is incomplete or of another kind: fetch it again"
        )
