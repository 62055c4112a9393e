"""What a UNet that takes ControlNets gets where none is in use."""

from __future__ import annotations

import numpy as np

from ipa.engines.engine import Array
from ipa.engines.spec import ComponentSpec, axis_size, residuals_of


def no_residuals(unet: ComponentSpec, batch: int, latent_height: int, latent_width: int) -> dict[str, Array]:
    """Zeros for every residual of the UNet, read-only, so that an engine keeps its copy over the steps."""
    sizes = {"batch": batch, "latent_height": latent_height, "latent_width": latent_width}
    zeros = {}
    for tensor in residuals_of(unet):
        array = np.zeros([axis_size(axis, sizes) for axis in tensor.axes], tensor.dtype)
        array.flags.writeable = False
        zeros[tensor.name] = array
    return zeros
