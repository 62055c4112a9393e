"""Which shapes an engine is built for: smallest, usual and largest size of every free axis of the spec table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ipa.engines.errors import RequestError
from ipa.engines.spec import ComponentSpec, axis_size

Shape = tuple[int, ...]
_SIDE_MULTIPLE = 8  # of pictures, in pixels
_HALVES = ("text_encoder", "text_encoder_2", "text_kv")  # run on the negative and the positive prompt


@dataclass(frozen=True)
class Range:
    """Smallest, usual and largest size."""

    smallest: int
    usual: int
    largest: int

    @classmethod
    def parse(cls, text: str, what: str) -> Range:
        """Read `4` or `1:1:4`.

        Args:
            what: name for the message.
        Raises:
            RequestError: not one or three numbers from 1 on that do not fall.
        """
        parts = text.split(":")
        if not all(re.fullmatch(r"[0-9]{1,6}", part) for part in parts) or len(parts) not in (1, 3):
            raise RequestError(f"{what}: {text!r} is neither a number nor smallest:usual:largest, such as 1:1:4")
        numbers = [int(part) for part in parts] * (3 if len(parts) == 1 else 1)
        if not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
            raise RequestError(f"{what}: {text!r} must have 1 <= smallest <= usual <= largest")
        return cls(*numbers)

    def times(self, factor: int) -> Range:
        """Every size multiplied."""
        return Range(self.smallest * factor, self.usual * factor, self.largest * factor)

    def __iter__(self) -> Iterator[int]:
        return iter((self.smallest, self.usual, self.largest))

    def __str__(self) -> str:
        return ":".join(map(str, self))


@dataclass(frozen=True)
class ShapeProfile:
    """Sizes that the engines of one bundle accept.

    Attributes:
        height, width: of pictures, in pixels.
        batch: pictures a call.
        tokens: of the image prompt, over all its images.
    """

    height: Range
    width: Range
    batch: Range
    tokens: Range

    @classmethod
    def parse(cls, resolutions: Sequence[str], batch: str, tokens: str) -> ShapeProfile:
        """Read the options of a command.

        Args:
            resolutions: `WIDTHxHEIGHT` in pixels; the first is the usual one, the engine covers all.
            batch, tokens: as `Range.parse` reads them. Engines take one token, too: that is a request without image
            prompt.
        Raises:
            RequestError: names the option and what it takes.
        """
        sizes = [_resolution(text) for text in resolutions]
        widths, heights = ([size[side] for size in sizes] for side in (0, 1))
        height, width = (Range(min(values), values[0], max(values)) for values in (heights, widths))
        return cls(height, width, Range.parse(batch, "--batch"), Range.parse(tokens, "--image-tokens"))

    def shapes(self, component: str, spec: ComponentSpec, downscale: int) -> dict[str, tuple[Shape, Shape, Shape]]:
        """Smallest, usual and largest shape of every input that has a free axis.

        Args:
            component: of the spec table, `ip_adapter/NAME` or `controlnet/NAME`.
            spec: its tensors.
            downscale: pixels per latent.
        """
        axes = self._axes(component, downscale)
        free = (tensor for tensor in spec.inputs if any(isinstance(axis, str) for axis in tensor.axes))
        smallest, usual, largest = (
            {axis: getattr(sizes, which) for axis, sizes in axes.items()} for which in ("smallest", "usual", "largest")
        )
        return {
            tensor.name: (
                tuple(axis_size(axis, smallest) for axis in tensor.axes),
                tuple(axis_size(axis, usual) for axis in tensor.axes),
                tuple(axis_size(axis, largest) for axis in tensor.axes),
            )
            for tensor in free
        }

    def _axes(self, component: str, downscale: int) -> Mapping[str, Range]:
        is_adapter = component.startswith("ip_adapter/")
        if component == "unet" or component.startswith("controlnet/"):  # without guidance there is no negative half
            batch = Range(self.batch.smallest, 2 * self.batch.usual, 2 * self.batch.largest)
        else:
            # Prompts and reference images, negative half first where there is one; the VAE takes picture by picture.
            batch = Range(1, 2 if component in _HALVES or is_adapter else 1, 2 * self.batch.largest)
        return {
            "batch": batch,
            "tokens": Range(1, self.tokens.usual, self.tokens.largest),
            "height": self.height,
            "width": self.width,
            "latent_height": _latent(self.height, downscale),
            "latent_width": _latent(self.width, downscale),
        }


def as_text(shapes: Mapping[str, tuple[Shape, Shape, Shape]]) -> str:
    """Shapes of a profile as one line: `sample 1x4x64x64:2x4x64x64:8x4x64x64, ...`."""
    return ", ".join(
        f"{name} {':'.join('x'.join(map(str, shape)) for shape in sizes)}" for name, sizes in sorted(shapes.items())
    )


def covers(profile: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether inputs of these shapes fit a profile that `as_text` wrote. Inputs it does not name have a fixed shape."""
    for entry in filter(None, profile.split(", ")):
        name, _, sizes = entry.rpartition(" ")
        smallest, _, largest = ([int(size) for size in shape.split("x")] for shape in sizes.split(":"))
        bounds = zip(smallest, shapes[name], largest, strict=True)
        if not all(least <= size <= most for least, size, most in bounds):
            return False
    return True


def _latent(pixels: Range, downscale: int) -> Range:
    return Range(*(size // downscale for size in pixels))


def _resolution(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if not found:
        raise RequestError(f"--resolution: {text!r} is not WIDTHxHEIGHT, such as 512x512")
    width, height = (int(part) for part in found.groups())
    if min(width, height) < 64 or width % _SIDE_MULTIPLE or height % _SIDE_MULTIPLE:
        raise RequestError(f"--resolution: {text!r}: both sides must be multiples of 8 from 64 on")
    return width, height
