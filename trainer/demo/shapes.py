"""Drawn scenes: one shape in one colour and texture on a plain background, and their captions."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Pixels = NDArray[np.uint8]

IMAGE_SIZE = 128
SUPERSAMPLING = 4  # outlines are drawn this much larger and box-reduced

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent")
TEXTURES = ("plain", "striped", "dotted")
# At least 110 apart in RGB, so that a nearest-colour vote survives jitter and blur.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "yellow": (245, 215, 50),
    "green": (40, 160, 60),
    "cyan": (60, 210, 230),
    "blue": (40, 70, 210),
    "purple": (170, 40, 170),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
COLOURS = tuple(PALETTE)
ADAPTER_NAMED = 0.15  # how often a caption beside an image prompt names texture, foreground or background
LIGHTENED = ("blue", "purple", "black")  # dark colours: their second tone is lighter, that of the others darker


@dataclass(frozen=True)
class Scene:
    """What an image shows. The shape is the prompt's part, the rest the image prompt's."""

    shape: str
    foreground: str
    background: str
    texture: str

    @property
    def is_held_out(self) -> bool:
        """Whether training never draws this combination (about one in ten; a fixed hash of the words)."""
        words = f"{self.shape} {self.foreground} {self.background} {self.texture}"
        return zlib.crc32(words.encode()) % 10 == 0


def all_scenes() -> Iterator[Scene]:
    """Every combination whose two colours differ, in a fixed order."""
    for shape, foreground, background, texture in product(SHAPES, COLOURS, COLOURS, TEXTURES):
        if foreground != background:
            yield Scene(shape, foreground, background, texture)


def training_scene(rng: np.random.Generator) -> Scene:
    """A combination drawn evenly from those that are not held out."""
    while True:
        foreground, background = rng.choice(len(COLOURS), size=2, replace=False)
        shape, texture = rng.integers(len(SHAPES)), rng.integers(len(TEXTURES))
        scene = Scene(SHAPES[shape], COLOURS[foreground], COLOURS[background], TEXTURES[texture])
        if not scene.is_held_out:
            return scene


def other_shape(scene: Scene, rng: np.random.Generator, *, held_out: bool = False) -> Scene:
    """The scene with another shape: the reference that shares only colours and texture with its target.

    Args:
        held_out: whether held-out combinations may be drawn (for evaluation only).
    """
    others = [replace(scene, shape=shape) for shape in SHAPES if shape != scene.shape]
    allowed = [other for other in others if held_out or not other.is_held_out]
    return allowed[rng.integers(len(allowed))]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """An adapter's caption: it always names the shape and mostly leaves the rest to the image prompt."""
    return describe(scene, *(rng.random(3) < ADAPTER_NAMED))


def describe(scene: Scene, texture: bool, foreground: bool, background: bool) -> str:
    """The caption that names the shape and the chosen attributes: "a striped red star on a blue background"."""
    words = ["a"]
    words += [scene.texture] if texture else []
    words += [scene.foreground] if foreground else []
    words += [scene.shape]
    words += ["on", "a", scene.background, "background"] if background else []
    return " ".join(words)


def draw(scene: Scene, rng: np.random.Generator) -> Pixels:
    """The scene at a random place, size and angle, as (128, 128, 3) uint8 with anti-aliased edges."""
    radius = rng.uniform(0.28, 0.38) * IMAGE_SIZE
    centre = rng.uniform(0.4, 0.6, size=2) * IMAGE_SIZE  # nothing touches the border
    angle = rng.uniform(-0.2, 0.2)
    foreground, background = (_jittered(name, rng) for name in (scene.foreground, scene.background))
    coverage = _coverage(scene.shape, radius, centre, angle)[..., None]
    second = _second_tone(scene.foreground, foreground)
    pattern = _pattern(scene.texture, rng, angle)[..., None]
    filled = foreground * (1 - pattern) + second * pattern
    blended = background * (1 - coverage) + filled * coverage
    return np.clip(np.rint(blended), 0, 255).astype(np.uint8)


def _jittered(name: str, rng: np.random.Generator) -> NDArray[np.float64]:
    return np.clip(np.asarray(PALETTE[name]) + rng.uniform(-6, 6, size=3), 0, 255)


def _second_tone(name: str, colour: NDArray[np.float64]) -> NDArray[np.float64]:
    """The other tone of stripes and dots: a clear shade of the foreground colour."""
    return colour + (255 - colour) * 0.5 if name in LIGHTENED else colour * 0.5


def _coverage(shape: str, radius: float, centre: NDArray[np.float64], angle: float) -> NDArray[np.float64]:
    """How much of each pixel the shape covers, (128, 128) in 0 to 1."""
    mask = Image.new("L", (IMAGE_SIZE * SUPERSAMPLING,) * 2)
    canvas = ImageDraw.Draw(mask)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    for outline, fill in _outlines(shape):
        points = ((outline * radius) @ rotation + centre) * SUPERSAMPLING
        canvas.polygon([(float(x), float(y)) for x, y in points], fill=fill)
    return np.asarray(mask.reduce(SUPERSAMPLING), dtype=np.float64) / 255


def _outlines(shape: str) -> list[tuple[NDArray[np.float64], int]]:
    """The shape as polygons in the unit circle (y down), painted in order: 255 fills, 0 cuts out."""
    turn = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    disc = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    match shape:
        case "circle":
            return [(disc * 0.95, 255)]
        case "square":
            return [(np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.78, 255)]
        case "triangle":
            return [(_spokes([1.0] * 3), 255)]
        case "star":
            return [(_spokes([1.0, 0.5] * 5), 255)]
        case "ring":
            return [(disc, 255), (disc * 0.5, 0)]
        case "cross":
            arm, tip = 0.36, 1.0
            corner = [[-arm, -tip], [arm, -tip], [arm, -arm]]
            quarter = np.array([[0, 1], [-1, 0]])  # a quarter turn of row vectors, in drawing order
            return [(np.concatenate([np.array(corner) @ np.linalg.matrix_power(quarter, k) for k in range(4)]), 255)]
        case "heart":
            x = 16 * np.sin(turn) ** 3
            y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
            return [(np.stack([x, -y - 2.5], axis=1) / 16.5, 255)]
        case "crescent":
            return [(disc, 255), (disc * 0.82 + np.array([0.5, 0.0]), 0)]
        case _:
            raise ValueError(f"no shape is called {shape!r}; there are {', '.join(SHAPES)}")


def _spokes(radii: list[float]) -> NDArray[np.float64]:
    """Corners at even angles, the first pointing up."""
    turn = np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
    corners: NDArray[np.float64] = np.stack([np.sin(turn), -np.cos(turn)], axis=1) * np.array(radii)[:, None]
    return corners


def _pattern(texture: str, rng: np.random.Generator, angle: float) -> NDArray[np.float64]:
    """How much of each pixel the second tone takes, (128, 128) in 0 to 1; at most 40 % on the whole."""
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE].astype(np.float64)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    period = rng.uniform(22, 28)
    shift_u, shift_v = rng.uniform(0, period, size=2)
    du, dv = (np.abs((w + shift) % period - period / 2) for w, shift in ((u, shift_u), (v, shift_v)))
    second: NDArray[np.float64] = np.zeros_like(u)
    match texture:
        case "plain":
            pass
        case "striped":
            second = np.clip(0.2 * period - du + 0.5, 0, 1)
        case "dotted":
            second = np.clip(0.33 * period - np.hypot(du, dv) + 0.5, 0, 1)
        case _:
            raise ValueError(f"no texture is called {texture!r}; there are {', '.join(TEXTURES)}")
    return second
