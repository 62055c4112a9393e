"""Which palette colours an image's foreground and background have, by counting pixels."""

import numpy as np
from numpy.typing import NDArray

from ipa.trainer.demo.shapes import COLOURS, LIGHTENED, PALETTE, Pixels

BORDER = 2  # px
FOREGROUND_DISTANCE = 60.0  # in RGB, from the background
_TONES = np.array([PALETTE[name] for name in COLOURS], np.float64)
_SECOND_TONES = np.array(
    [(tone + 255) / 2 if name in LIGHTENED else tone / 2 for name, tone in zip(COLOURS, _TONES, strict=True)]
)


def background_colour(image: Pixels) -> str:
    """The palette colour nearest to the median of the border."""
    return COLOURS[int(np.argmin(_distances(_border_median(image)[None], _TONES)[0]))]


def foreground_colour(image: Pixels) -> str | None:
    """The palette colour that most foreground pixels are nearest to; None where nothing stands out.

    Pixels nearer to the second tone of a texture than to any palette colour do not vote, and
    neither does the outline, where colours mix.
    """
    pixels = image.astype(np.float64)
    stands_out = _eroded(np.linalg.norm(pixels - _border_median(image), axis=-1) > FOREGROUND_DISTANCE)
    nearest = np.argmin(_distances(pixels[stands_out], np.concatenate([_TONES, _SECOND_TONES])), axis=1)
    votes = np.bincount(nearest[nearest < len(COLOURS)], minlength=len(COLOURS))
    return COLOURS[int(np.argmax(votes))] if votes.any() else None


def _border_median(image: Pixels) -> NDArray[np.float64]:
    inner = np.zeros(image.shape[:2], dtype=bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    median: NDArray[np.float64] = np.median(image[~inner].astype(np.float64), axis=0)
    return median


def _distances(colours: NDArray[np.float64], tones: NDArray[np.float64]) -> NDArray[np.float64]:
    distances: NDArray[np.float64] = np.linalg.norm(colours[:, None] - tones[None], axis=-1)
    return distances


def _eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask without pixels whose 3 x 3 neighbourhood leaves it."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    kept = mask.copy()
    for y in range(3):
        for x in range(3):
            kept &= padded[y : y + height, x : x + width]
    return kept
