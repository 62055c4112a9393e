"""The models that see pictures as vectors: CLIP, DINO, Inception, and the demo's own image encoder."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ipa.benchmarks.quality_keys import files_sha256
from ipa.engines.bundle import hash_file
from ipa.engines.errors import IpaError, first_line
from ipa.runtime.image_prompt import ImagePrompt
from ipa.runtime.pipeline import Pipeline

Vector = NDArray[np.float32]
_MODEL_FILES = (".json", ".safetensors", ".bin", ".txt")
_DINO_TYPES = ("vit", "dinov2", "dinov2_with_registers")  # their first token is the class token


class Embedder(Protocol):
    """A model that makes a vector of a picture.

    Attributes:
        title: for people.
        sha256: of the model.
    """

    title: str
    sha256: str

    def image(self, image: Image.Image) -> Vector:
        """(width,) of an RGB picture of any size."""


class Clip:
    """CLIP of transformers, both towers with their projections."""

    def __init__(self, folder: Path) -> None:
        """Load a folder as transformers saves it, tokenizer and preprocessing included.

        Raises:
            IpaError: it is not such a folder.
        """
        from transformers import AutoTokenizer, CLIPModel

        self._model, self._processor = _load("--clip", folder, CLIPModel, ("clip",))
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises anything
            raise IpaError(f"--clip {folder}: its tokenizer cannot be loaded: {first_line(error)}") from error
        self.title, self.sha256 = str(folder), _model_sha256(folder)
        self._tokens = self._model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def image(self, image: Image.Image) -> Vector:
        """The class token, projected."""
        pixels = self._processor(image, return_tensors="pt")["pixel_values"].to(torch_device())
        return _vector(self._model.visual_projection(self._model.vision_model(pixels).pooler_output))

    @torch.inference_mode()
    def text(self, text: str) -> Vector:
        """The end token, projected; a text that is longer than the model takes is cut."""
        tokens = self._tokenizer([text], truncation=True, max_length=self._tokens, return_tensors="pt").to(
            torch_device()
        )
        return _vector(self._model.text_projection(self._model.text_model(**tokens).pooler_output))


class DemoClip:
    """The demo's image encoder, run by our runtime.

    It has no text: the text tower's projection was of use to its own training alone and is not in the bundle.
    """

    title = "demo: its own image encoder, which its adapter sees with, too"

    def __init__(self, pipe: Pipeline) -> None:
        """Borrow it.

        Args:
            pipe: of the demo's bundle.
        """
        self._pipe, self.sha256 = pipe, pipe.bundle.graph("image_encoder").sha256

    def image(self, image: Image.Image) -> Vector:
        """`image_embeds`."""
        prompt = ImagePrompt((image,), adapter=self._pipe.manifest.defaults.adapter)
        _, positive = self._pipe.image_embeds(prompt)
        return np.asarray(positive[0], np.float32)


class Dino:
    """The class token of DINO (a ViT) or DINOv2 after the last norm. Source: arXiv:2208.12242, section 4.2."""

    def __init__(self, folder: Path) -> None:
        """Load a folder as transformers saves it, preprocessing included.

        Raises:
            IpaError: it is not such a folder.
        """
        from transformers import AutoModel

        self._model, self._processor = _load("--dino", folder, AutoModel, _DINO_TYPES)
        self.title, self.sha256 = str(folder), _model_sha256(folder)

    @torch.inference_mode()
    def image(self, image: Image.Image) -> Vector:
        """The class token."""
        pixels = self._processor(image, return_tensors="pt")["pixel_values"].to(torch_device())
        return _vector(self._model(pixels).last_hidden_state[:, 0])


class Inception:
    """The features that FID compares: torch-fidelity's Inception by way of torchmetrics."""

    resize = "to 299 x 299 by torchmetrics: bilinear, antialiased"

    def __init__(self, file: Path) -> None:
        """Load it.

        Args:
            file: weights as torch-fidelity has them, `pt_inception-2015-12-05-6726825d.pth`.
        Raises:
            IpaError: they cannot be loaded.
        """
        from torchmetrics.image.fid import FrechetInceptionDistance

        try:
            metric = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(file))
        except Exception as error:  # torch raises anything on files of another kind
            raise IpaError(f"--inception {file}: cannot be loaded: {first_line(error)}") from error
        self._network = metric.inception.to(torch_device())
        self.title, self.sha256 = str(file), hash_file(file)

    @torch.inference_mode()
    def image(self, image: Image.Image) -> Vector:
        """(2048,), the last pooling."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        return _vector(self._network(pixels.to(torch_device())))


def inception_obstacle() -> str:
    """Why FID cannot be had here; empty: it can.

    torchmetrics asks only whether torch-fidelity is installed: where that cannot be imported, neither can torchmetrics.
    """
    if find_spec("torch_fidelity") is None:
        return "torch-fidelity is not installed: `pip install torch-fidelity`"
    try:
        import_module("torch_fidelity")
    except Exception as error:  # mostly its torchvision, which is missing or was built for another torch
        return (
            f"torch-fidelity is installed but cannot be imported ({first_line(error)}): "
            "`pip install torchvision` to match torch, or uninstall torch-fidelity, which breaks torchmetrics as it is"
        )
    return ""


def _load(option: str, folder: Path, cls: Any, types: tuple[str, ...]) -> tuple[Any, Any]:
    """Model and preprocessing; `cls` would fill weights that are missing with random ones."""
    from transformers import AutoImageProcessor

    try:
        found = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise IpaError(
            f"{option} {folder}: has no readable config.json; name a folder as transformers' save_pretrained writes it"
        ) from error
    if found not in types:
        raise IpaError(f"{option} {folder}: its config.json says model_type {found!r}, expected {' or '.join(types)}")
    try:
        # In float32 whatever the file holds: by itself, transformers 5 computes in the dtype that it was saved in.
        model, info = cls.from_pretrained(folder, local_files_only=True, output_loading_info=True, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    except Exception as error:  # transformers raises anything, of a missing file up to a wrong shape
        raise IpaError(f"{option} {folder}: transformers cannot load it: {first_line(error)}") from error
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise IpaError(f"{option} {folder}: {len(missing)} weights are missing, such as {missing[0]}; copy it again")
    return model.eval().to(torch_device()), processor


def torch_device() -> torch.device:
    """Where judges compute: the GPU, if PyTorch has one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _vector(batch: torch.Tensor) -> Vector:
    return np.asarray(batch[0].float().cpu().numpy())


def _model_sha256(folder: Path) -> str:
    return files_sha256(folder, (file for file in folder.iterdir() if file.suffix in _MODEL_FILES))
