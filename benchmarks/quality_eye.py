"""A model's vectors of pictures and texts, kept on disk by the sha256 of what they are of.

Each is made by itself: in a batch the last bits of a vector depend on what else is in it, and the figures of a run that
was interrupted would differ from those of one that was not.
"""

from __future__ import annotations

import hashlib
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ipa.benchmarks.quality_data import Item
from ipa.benchmarks.quality_models import Clip, Embedder, Vector
from ipa.engines.bundle import hash_file
from ipa.engines.closing import Closing
from ipa.runtime.image_files import open_image
from ipa.trainer.files import atomic_path

_SAVE_SECONDS = 60.0


class Eye(Closing):
    """Looks at pictures with a model; what it saw before it looks up. Closing it writes what is new."""

    def __init__(self, model: Embedder, folder: Path) -> None:
        """Open it.

        Args:
            model: makes the vectors.
            folder: for its file, which the model's sha256 names.
        """
        self.model = model
        self._file = folder / f"{model.sha256[:32]}.npz"
        self._vectors = _read(self._file)
        self._new, self._saved_at = 0, time.monotonic()

    def close(self) -> None:
        """Write what is new."""
        if not self._new:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._file) as partial, partial.open("wb") as file:
            np.savez(file, sha256=np.array(list(self._vectors)), vectors=np.stack(list(self._vectors.values())))
        self._new, self._saved_at = 0, time.monotonic()

    def picture(self, file: Path) -> Vector:
        """Of a picture that was drawn."""
        return self._kept(hash_file(file), lambda: self.model.image(open_image(file)))

    def reference(self, item: Item) -> Vector:
        """Of an image prompt."""
        return self._kept(item.sha256, lambda: self.model.image(open_image(item.reference)))

    def real(self, item: Item, size: tuple[int, int]) -> Vector:
        """Of the data's picture, its centre scaled to the (width, height) that is drawn."""

        def make() -> Vector:
            return self.model.image(ImageOps.fit(open_image(item.real), size, Image.Resampling.BICUBIC))

        source = hash_file(item.real) if isinstance(item.real, Path) else item.sha256
        return self._kept(f"{source} {size[0]}x{size[1]}", make)

    def text(self, text: str) -> Vector:
        """Of a text; the model must be a `Clip`."""
        assert isinstance(self.model, Clip)
        model = self.model
        return self._kept(f"text {hashlib.sha256(text.encode()).hexdigest()}", lambda: model.text(text))

    def _kept(self, key: str, make: Callable[[], Vector]) -> Vector:
        if key not in self._vectors:
            self._vectors[key] = make()
            self._new += 1
            if time.monotonic() - self._saved_at > _SAVE_SECONDS:
                self.close()
        return self._vectors[key]


def _read(file: Path) -> dict[str, Vector]:
    """What a file holds; one that cannot be read holds nothing, and is written anew."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(zip(map(str, arrays["sha256"]), arrays["vectors"], strict=True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
