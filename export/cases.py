"""Inputs to validate components on: random ones of many sizes, and extreme ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ipa.engines.engine import Array
from ipa.engines.manifest import Manifest
from ipa.engines.spec import ADAPTER_FEATURES, ComponentSpec, TensorSpec, added_conditions, axis_size

Size = tuple[int, int, int, int]  # batch, tokens, latent_height, latent_width
# Multiples of 8 and others, the smallest picture (64 x 64 pixels) too.
SIZES: Sequence[Size] = ((1, 4, 8, 8), (2, 1, 16, 16), (3, 16, 9, 25), (2, 5, 24, 16))
_TIMESTEPS = (0, 999, 500, 1)
# How far real inputs go, as a factor on unit variance: latents of a VAE whose scaling factor is 0.18 have a deviation
# of 5; CLIP's hidden states have outliers of about 30.
_EXTREMES = {"latents": 8.0, "encoder_hidden_states": 10.0, "image_embeds": 10.0, "hidden_states": 10.0}
_EXTREMES |= {"sample": 8.0, "text_embeds": 10.0}
_PICTURES = {"image": -1.0, "pixel_values": -1.0, "controlnet_cond": 0.0}  # what black is; white is 1
_LARGEST_PIXEL = 2048


def cases(
    spec: ComponentSpec, downscale: int, vocabulary: int, sizes: Sequence[Size] = SIZES
) -> Iterator[tuple[str, dict[str, Array]]]:
    """Named input sets for one component.

    Args:
        spec: of the component, with its sizes.
        downscale: pixels per latent.
        vocabulary: number of token ids.
        sizes: to draw.
    """
    for seed, size in enumerate(sizes):
        batch, _, height, width = size
        axes = free_axes(size, downscale)
        random = np.random.default_rng(seed)
        inputs = {tensor.name: _draw(tensor, axes, random, seed, vocabulary) for tensor in spec.inputs}
        yield f"batch {batch}, {height}x{width}", inputs
        for name, change in _extremes(inputs, vocabulary).items():
            yield name, {**inputs, **change}


def free_axes(size: Size, downscale: int) -> dict[str, int]:
    """The spec table's free axes."""
    batch, tokens, height, width = size
    return {
        "batch": batch,
        "tokens": tokens,
        "tokens_1": tokens + 2,
        "latent_height": height,
        "latent_width": width,
        "height": height * downscale,
        "width": width * downscale,
    }


def _draw(
    tensor: TensorSpec, sizes: Mapping[str, int], random: np.random.Generator, seed: int, vocabulary: int
) -> Array:
    shape = [axis_size(axis, sizes) for axis in tensor.axes]
    if tensor.name == "timestep":
        return np.asarray(_TIMESTEPS[seed % len(_TIMESTEPS)], tensor.dtype)
    if tensor.dtype == "int64":
        return random.integers(0, vocabulary, shape)
    if tensor.name == "time_ids":  # pixels
        return random.integers(0, _LARGEST_PIXEL, shape).astype(tensor.dtype)
    if tensor.name in _PICTURES:
        return random.uniform(_PICTURES[tensor.name], 1, shape).astype(tensor.dtype)
    return random.standard_normal(shape).astype(tensor.dtype)


def _extremes(inputs: Mapping[str, Array], vocabulary: int) -> dict[str, dict[str, Array]]:
    """Names and replaced inputs.

    No flat picture: where all values of a group are equal, its norm divides rounding errors by their own size.
    """
    found: dict[str, dict[str, Array]] = {}
    for name, array in inputs.items():
        if name == "input_ids":
            found["first token only"] = {name: np.zeros_like(array)}
            found["last token only"] = {name: np.full_like(array, vocabulary - 1)}
        elif name in _PICTURES:
            halves = np.ones_like(array)
            halves[..., : array.shape[-1] // 2] = _PICTURES[name]
            found["black and white halves"] = {name: halves}
        elif name == "encoder_hidden_states" and "controlnet_cond" in inputs:
            continue  # its attention is inside: ten times the text is ten times the scores, and half's rounding of them
        elif name in _EXTREMES:
            found[f"{name} x {_EXTREMES[name]:g}"] = {name: (array * _EXTREMES[name]).astype(array.dtype)}
        if name == "image_embeds":  # the negative half of a guidance batch, for a base adapter
            found["zeros"] = {name: np.zeros_like(array)}
    return found


def step_inputs(manifest: Manifest, sizes: Sequence[Size] = SIZES) -> Iterator[tuple[str, dict[str, Array]]]:
    """Named inputs of a whole step: latents, timestep, text and what SDXL adds, image features, a control image."""
    components = (*(record.component for record in manifest.controlnets.values()), *manifest.components.values())
    tensors = {tensor.name: tensor for record in components for tensor in record.spec.inputs}
    tensors |= {tensor.name: tensor for tensor in manifest.components["image_encoder"].spec.outputs}
    added = [tensor.name for tensor in added_conditions(manifest.family)]
    names = ["sample", "timestep", "encoder_hidden_states", *added, *ADAPTER_FEATURES]
    names += ["controlnet_cond"] if manifest.controlnets else []
    for seed, size in enumerate(sizes):
        batch, _, height, width = size
        axes = free_axes(size, manifest.vae.downscale)
        random = np.random.default_rng(seed)
        inputs = {name: _draw(tensors[name], axes, random, seed, 1) for name in names}
        yield f"batch {batch}, {height}x{width}, timestep {inputs['timestep']:g}", inputs
