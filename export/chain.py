"""A whole step by a bundle's engines, as the runtime chains them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from ipa.engines.bundle import Bundle
from ipa.engines.engine import Array, Engine
from ipa.engines.kv_layout import KVLayout
from ipa.engines.packed_kv import image_inputs, scale_values
from ipa.engines.residuals import no_residuals
from ipa.engines.spec import added_conditions


class Chain:
    """The bundle's side of a step: text and image to keys and values, scaled, into the UNet."""

    def __init__(self, bundle: Bundle, engine: str) -> None:
        """Open the graphs with one back-end."""
        self._layout: KVLayout = bundle.manifest.kv_layout
        self._family = bundle.manifest.family
        with ExitStack() as opened:
            self.text_kv = opened.enter_context(bundle.open_component("text_kv", engine))
            self.unet = opened.enter_context(bundle.open_component("unet", engine))
            self._opened = opened.pop_all()

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def __call__(
        self,
        inputs: Mapping[str, Array],
        adapter: Engine | None = None,
        scale: float = 0.0,
        control: tuple[Engine, float] | None = None,
    ) -> Array:
        """Predicted noise.

        Args:
            inputs: as `ipa.export.oracle.DiffusersStep` takes them, in the graphs' dtype.
            adapter: component of an image prompt; `None`: the base model alone.
            scale: `ip_adapter_scale`.
            control: component of a ControlNet and its `controlnet_conditioning_scale`.
        """
        sample = inputs["sample"]
        text_kv = self.text_kv(encoder_hidden_states=inputs["encoder_hidden_states"])["text_kv"]
        prompts = []
        if adapter is not None:
            feature = adapter.spec.inputs[0].name
            image_kv = adapter(**{feature: inputs[feature]})["image_kv"]
            prompts.append(scale_values(image_kv, self._layout, scale))
        batch, _, height, width = sample.shape
        images = image_inputs(self.unet.spec, self._layout, (batch, height, width), prompts)
        residuals = no_residuals(self.unet.spec, batch, height, width)
        if control is not None:
            residuals = _residuals(*control, inputs)
        added = {tensor.name: inputs[tensor.name] for tensor in added_conditions(self._family)}
        others = {**added, **images, **residuals}
        step = self.unet(sample=sample, timestep=inputs["timestep"], text_kv=text_kv, **others)
        return step["noise_pred"]


def _residuals(controlnet: Engine, scale: float, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Scaled ones, in their own dtype."""
    given = {tensor.name: inputs[tensor.name] for tensor in controlnet.spec.inputs}
    given["sample"] = given["sample"][:, : controlnet.spec.inputs[0].axes[1]]  # an inpainting model takes more
    return {name: array * array.dtype.type(scale) for name, array in controlnet(**given).items()}
