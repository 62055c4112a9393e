"""ControlNets in the denoising loop: control images and text to what they add inside the UNet at each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ipa.engines.bundle import Bundle
from ipa.engines.engine import Array, Engine
from ipa.engines.errors import RequestError
from ipa.engines.residuals import no_residuals
from ipa.engines.spec import ComponentSpec, residuals_of
from ipa.runtime.conditioning import guidance_batch
from ipa.runtime.control_image import ControlImage
from ipa.runtime.images import open_image

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class ControlledRun:
    """One request of a batch, as ControlNets see it.

    Attributes:
        controls: opened.
        text: what ControlNets are told of it, by input: (2, ...) negative and positive, (1, ...) where alike; empty
            without controls.
        count: how many pictures it makes.
        height, width: of them.
    """

    controls: tuple[ControlImage, ...]
    text: Mapping[str, Array]
    count: int
    height: int
    width: int


def resolved_controls(controls: Sequence[ControlImage], bundle: Bundle) -> tuple[ControlImage, ...]:
    """The same with the names of ControlNets that the bundle has.

    Raises:
        RequestError: it has none, none of that name, or several where none is named.
    """
    known = sorted(bundle.manifest.controlnets)
    if controls and not known:
        raise RequestError(
            f"a control image was given, but {bundle.root} has no ControlNet: "
            "export it again with `ipa-export onnx ... --controlnet [NAME=]DIR_OR_ID`"
        )
    if len(known) > 1 and any(control.name is None for control in controls):
        raise RequestError(
            f"{bundle.root} has several ControlNets: write --control-image NAME=FILE, with NAME one of "
            f"{', '.join(known)}"
        )
    named = tuple(replace(control, name=control.name or known[0]) for control in controls)
    for control in named:
        bundle.controlnet(str(control.name))
    return named


def opened_controls(controls: Sequence[ControlImage]) -> tuple[ControlImage, ...]:
    """The same with their pictures read.

    Raises:
        RequestError: a file is missing or no picture.
    """
    return tuple(replace(control, image=open_image(control.image)) for control in controls)


def control_pixels(image: Image.Image, height: int, width: int) -> FloatArray:
    """A control image as a ControlNet takes it, (1, 3, height, width) from 0 to 1.

    Source: diffusers 0.42.1, image_processor.py, `VaeImageProcessor.preprocess` without normalisation.
    """
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    pixels: FloatArray = np.asarray(resized, np.float32) / np.float32(255)
    return pixels.transpose(2, 0, 1)[None]


class ControlInputs:
    """The UNet's inputs for ControlNets at each step. A UNet that was exported without them has none."""

    def __init__(
        self,
        runs: Sequence[ControlledRun],
        bundle: Bundle,
        engine: Callable[[str], Engine],
        unet: ComponentSpec,
        size: tuple[int, int],
        has_guidance: bool,
        guess_mode: bool,
    ) -> None:
        """Take the control images in use.

        Args:
            runs: the requests of a batch, with the same ControlNets in the same order.
            engine: opens a component; called only for ControlNets in use.
            unet: its spec.
            size: height and width of the latents.
            guess_mode: ControlNets count for the positive half alone, those of early layers less; a first one whose
                residuals have no place makes it so, too.
        """
        self._counts, self._halves = [run.count for run in runs], 2 if has_guidance else 1
        self._residuals = residuals_of(unet)
        self._scales = [[run.controls[place].scale_at for run in runs] for place in range(len(runs[0].controls))]
        names = [str(control.name) for control in runs[0].controls]
        # The first decides for all. Source: diffusers 0.42.1, pipeline_controlnet.py, `nets[0].config`.
        guesses = guess_mode or (bool(names) and bundle.manifest.controlnets[names[0]].is_global)
        self._nets = [self._net(runs, place, bundle, engine, has_guidance, guesses) for place in range(len(names))]
        self._nothing = no_residuals(unet, sum(self._counts) * self._halves, *size)

    def _net(
        self,
        runs: Sequence[ControlledRun],
        place: int,
        bundle: Bundle,
        engine: Callable[[str], Engine],
        has_guidance: bool,
        guesses: bool,
    ) -> _Net:
        """The ControlNet that the control images in one place are for."""
        name = str(runs[0].controls[place].name)
        is_global = bundle.manifest.controlnets[name].is_global
        opened = engine(f"controlnet/{name}")
        dtype = opened.spec.inputs[0].dtype
        on_both = has_guidance and not guesses
        pixels = [control_pixels(_picture(run.controls[place]), run.height, run.width) for run in runs]
        names = [tensor.name for tensor in opened.spec.inputs if tensor.name in runs[0].text]
        inputs = {name: guidance_batch([run.text[name] for run in runs], self._counts, on_both) for name in names}
        inputs["controlnet_cond"] = guidance_batch(pixels, self._counts, on_both).astype(dtype)
        for array in inputs.values():
            array.flags.writeable = False
        # Source: diffusers 0.42.1, controlnet.py, `ControlNetModel.forward`, "6. scaling".
        weights = np.ones(len(self._residuals), np.float32)
        if guesses and not is_global:
            weights = np.logspace(-1, 0, len(self._residuals), dtype=np.float32)
        return _Net(opened, inputs, 2 if on_both else 1, weights)

    def at(self, index: int, count: int, sample: FloatArray, timestep: float) -> Mapping[str, Array]:
        """Those of step `index` of `count`.

        Args:
            sample: (pictures, channels, height, width) latents as the scheduler scales them for the UNet.
            timestep: training index.
        """
        total: dict[str, FloatArray] = {}
        for net, scales in zip(self._nets, self._scales, strict=True):
            rows = np.repeat([np.float32(scale(index, count)) for scale in scales], self._counts)
            if not rows.any():
                continue
            found = net(sample, timestep)
            for tensor, weight in zip(self._residuals, net.weights, strict=True):
                factors = np.tile(rows, net.halves)[:, None, None, None] * weight
                scaled = found[tensor.name].astype(np.float32, copy=False) * factors
                if net.halves < self._halves:
                    scaled = np.concatenate([np.zeros_like(scaled), scaled])
                total[tensor.name] = total[tensor.name] + scaled if tensor.name in total else scaled
        if not total:
            return self._nothing
        return {tensor.name: total[tensor.name].astype(tensor.dtype, copy=False) for tensor in self._residuals}


@dataclass(frozen=True)
class _Net:
    """An opened ControlNet with what it gets at every step; `weights` of its residuals, in their order."""

    engine: Engine
    inputs: Mapping[str, Any]
    halves: int  # of the guidance batch that go through it
    weights: FloatArray

    def __call__(self, sample: FloatArray, timestep: float) -> Mapping[str, Array]:
        dtype = self.engine.spec.inputs[0].dtype
        return self.engine(
            sample=np.concatenate([sample] * self.halves).astype(dtype, copy=False),
            timestep=np.asarray(timestep, np.float32),
            **self.inputs,
        )


def _picture(control: ControlImage) -> Image.Image:
    assert isinstance(control.image, Image.Image)
    return control.image
