"""Files of textual inversion, and diffusers' pipelines that load them, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from tiny import TEXT_WIDTH
from tiny_xl import TEXT_WIDTHS


def pipeline(base: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    # diffusers 0.42 asks for `text_model` when layers are skipped; transformers 5.6 put its contents one level up.
    object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def xl_pipeline(base: Path) -> Any:
    pipe = StableDiffusionXLPipeline.from_pretrained(base, local_files_only=True, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_words(pipe: Any, file: Path, word: str) -> None:
    """Load a file of Stable Diffusion XL as diffusers' documentation does, one encoder after the other."""
    state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    pipe.load_textual_inversion(state["clip_l"], word, pipe.tokenizer, pipe.text_encoder)
    pipe.load_textual_inversion(state["clip_g"], word, pipe.tokenizer_2, pipe.text_encoder_2)


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def saved(state: dict[str, torch.Tensor], file: Path) -> Path:
    save_file(state, file)
    return file


def pickled(content: object, file: Path) -> Path:
    torch.save(content, file)
    return file


def a1111(tensor: torch.Tensor, name: str) -> dict[str, Any]:
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": tensor}, "name": name, "step": 100}


def xl_vectors(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = zip(("clip_l", "clip_g"), TEXT_WIDTHS, strict=True)
    return {name: torch.randn(count, width, generator=generator) for name, width in both}
