"""The kinds of IP-Adapters: told by the names of a file's tensors, sized by their shapes.

Light adapters are of the kind base, plus-face ones of the kind plus: their files have the same layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ipa.engines.errors import IpaError
from ipa.engines.manifest import ZERO_FEATURE, ZERO_PIXELS
from ipa.engines.spec import ADAPTER_FEATURES, Dimensions
from ipa.export.adapter_modules import HEAD_WIDTH, LinearProjection, PositionProjection, Projection, Resampler
from ipa.export.adapter_tensors import TensorGroup

MakeProjection = Callable[[], Projection]
# By feature: what its width is called, and which encoders have which.
_WIDTHS = {
    "image_embeds": ("embedding width", "1024: ViT-H/14, 1280: ViT-bigG/14"),
    "hidden_states": ("hidden width", "1280: ViT-H/14, 1664: ViT-bigG/14"),
}


@dataclass(frozen=True)
class Kind:
    """One kind.

    Attributes:
        name: as manifests have it.
        feature: the image encoder's output that its graph reads.
        negative: how the feature of the negative half is made, `ZERO_FEATURE` or `ZERO_PIXELS`.
        sized: a maker of its projection, from the tensors of a file and the sizes of a base model.
    """

    name: str
    feature: str
    negative: str
    sized: Callable[[TensorGroup, Dimensions], MakeProjection]

    def projection(self, image_proj: TensorGroup, dimensions: Dimensions) -> MakeProjection:
        """A maker of the projection that a file holds; every tensor is checked.

        Raises:
            IpaError: the file is incomplete, or for another image encoder or base model.
        """
        make = self.sized(image_proj, dimensions)
        with torch.device("meta"):
            projection = make()
        axis = ADAPTER_FEATURES[self.feature].axes[-1]
        expected = dimensions.sizes()[str(axis)]
        if projection.feature_width != expected:
            what, known = _WIDTHS[self.feature]
            raise IpaError(
                f"adapter {image_proj.path} was trained with an image encoder of {what} {projection.feature_width}, "
                f"this one has {expected} ({known}); export with the adapter's own, "
                "`ipa-export onnx --image-encoder DIR_OR_ID`"
            )
        image_proj.expect({name: tuple(tensor.shape) for name, tensor in projection.state_dict().items()})
        return make


def kind_of(image_proj: TensorGroup, ip_adapter: TensorGroup) -> Kind:
    """Which kind a file is.

    Raises:
        IpaError: one that is not supported.
    """
    names = image_proj.tensors
    # The order matters: later kinds have the tensors of earlier ones, too.
    if "proj.weight" in names:
        return BASE
    if "proj.3.weight" in names:
        return FULL_FACE
    if "perceiver_resampler.proj_in.weight" in names:
        raise _face_id("FaceID-Plus", ip_adapter)
    if "norm.weight" in names:
        raise _face_id("FaceID" if _has_lora(ip_adapter) else "FaceID-portrait", ip_adapter)
    if "latents" in names:
        return PLUS
    raise IpaError(
        f"adapter {image_proj.path} is of an unknown kind: its image_proj starts with {min(names)}; "
        f"known are {', '.join(KINDS)}"
    )


def _base(image_proj: TensorGroup, dimensions: Dimensions) -> MakeProjection:
    out_features, feature_width = image_proj.shape("proj.weight", 2)
    tokens = max(1, out_features // dimensions.text_width)
    return partial(LinearProjection, feature_width, tokens, dimensions.text_width)


def _full_face(image_proj: TensorGroup, dimensions: Dimensions) -> MakeProjection:
    _, feature_width = image_proj.shape("proj.0.weight", 2)
    return partial(PositionProjection, feature_width, dimensions.image_patches, dimensions.text_width)


def _plus(image_proj: TensorGroup, dimensions: Dimensions) -> MakeProjection:
    _, tokens, latent_width = image_proj.shape("latents", 3)
    _, feature_width = image_proj.shape("proj_in.weight", 2)
    attention_width, _ = image_proj.shape("layers.0.0.to_q.weight", 2)
    feed_forward_width, _ = image_proj.shape("layers.0.1.1.weight", 2)
    if attention_width % HEAD_WIDTH:
        raise IpaError(
            f"adapter {image_proj.path}: the attention of its resampler is {attention_width} wide, expected a multiple "
            f"of {HEAD_WIDTH}, the size of a head; the file is of another kind"
        )
    found = (re.match(r"layers\.(\d+)\.", name) for name in image_proj.tensors)
    depth = len({match[1] for match in found if match})
    return partial(
        Resampler,
        feature_width,
        tokens,
        dimensions.text_width,
        latent_width,
        attention_width,
        feed_forward_width,
        depth,
    )


BASE = Kind("base", "image_embeds", ZERO_FEATURE, _base)
PLUS = Kind("plus", "hidden_states", ZERO_PIXELS, _plus)
FULL_FACE = Kind("full-face", "hidden_states", ZERO_PIXELS, _full_face)
KINDS = {kind.name: kind for kind in (BASE, PLUS, FULL_FACE)}


def _face_id(name: str, ip_adapter: TensorGroup) -> IpaError:
    lora = ", and its LoRA changes the UNet, which all adapters of a bundle share" if _has_lora(ip_adapter) else ""
    return IpaError(
        f"adapter {ip_adapter.path} is of the kind {name}, which is not supported: it reads face embeddings of "
        f"InsightFace, which ipa-runtime does not compute{lora}; for faces use a plus-face or full-face adapter"
    )


def _has_lora(ip_adapter: TensorGroup) -> bool:
    return any("_lora." in name for name in ip_adapter.tensors)
