"""The sizes of a base model, read from its configurations or from a bundle."""

from __future__ import annotations

from ipa.engines.manifest import Manifest
from ipa.engines.spec import SDXL, Dimensions, ImageSlots, family_specs, residuals_of, unet_spec
from ipa.export.pipeline import BasePipeline


def base_dimensions(base: BasePipeline) -> Dimensions:
    """The sizes that a base model and its image encoder fix."""
    image = base.image_config
    two = base.text_configs if base.family == SDXL else {}
    widths = {f"text_width_{index}": int(config["hidden_size"]) for index, config in enumerate(two.values(), 1)}
    return Dimensions(
        text_tokens=base.text_tokens,
        text_width=base.text_width,
        kv=base.kv_layout.size,
        image_size=image["image_size"],
        image_embed_width=image["projection_dim"],
        image_patches=(image["image_size"] // image["patch_size"]) ** 2 + 1,  # one is the class token
        image_hidden_width=image["hidden_size"],
        latent_channels=base.vae_config.get("latent_channels", 4),
        unet_in_channels=base.unet_config.get("in_channels", 4),
        text_embed_width=base.text_embed_width,
        **widths,
    )


def manifest_dimensions(manifest: Manifest) -> Dimensions:
    """The sizes that the spec table names, as the components of a bundle have them."""
    sizes: dict[str, int] = {}
    family, levels = manifest.family, manifest.kv_layout.levels
    for name, record in manifest.components.items():
        actual = record.spec
        generic = family_specs(family)[name]
        if name == "unet":
            generic = unet_spec(ImageSlots.of(actual), levels, residuals_of(actual), family)
        pairs = zip((*generic.inputs, *generic.outputs), (*actual.inputs, *actual.outputs), strict=True)
        for named, sized in pairs:
            for axis, size in zip(named.axes, sized.axes, strict=True):
                if isinstance(axis, str) and isinstance(size, int):
                    sizes[axis] = size
    return Dimensions(**sizes)
