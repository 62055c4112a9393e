"""Names and shapes in the published adapter files, by kind (`tiny.tiny_adapter` fills them), and how to read one."""

from __future__ import annotations

from pathlib import Path

from ipa.engines.bundle import Bundle
from ipa.export.adapters import AdapterWeights, read_adapter
from ipa.export.dimensions import manifest_dimensions

Shapes = dict[str, tuple[int, ...]]


def base_shapes(embed_width: int, tokens: int, width: int) -> Shapes:
    """`image_proj` of the kind base."""
    return {
        "proj.weight": (tokens * width, embed_width),
        "proj.bias": (tokens * width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }


def full_face_shapes(hidden_width: int, width: int) -> Shapes:
    """`image_proj` of the kind full-face."""
    return {
        "proj.0.weight": (hidden_width, hidden_width),
        "proj.0.bias": (hidden_width,),
        "proj.2.weight": (width, hidden_width),
        "proj.2.bias": (width,),
        "proj.3.weight": (width,),
        "proj.3.bias": (width,),
    }


def resampler_shapes(
    hidden_width: int, tokens: int, width: int, latent_width: int, attention_width: int, depth: int = 4, ratio: int = 4
) -> Shapes:
    """`image_proj` of the kind plus; diffusers itself loads only a depth of 4 and heads of 64."""
    shapes: Shapes = {
        "latents": (1, tokens, latent_width),
        "proj_in.weight": (latent_width, hidden_width),
        "proj_in.bias": (latent_width,),
        "proj_out.weight": (width, latent_width),
        "proj_out.bias": (width,),
        "norm_out.weight": (width,),
        "norm_out.bias": (width,),
    }
    for layer in range(depth):
        attention, feed_forward = f"layers.{layer}.0", f"layers.{layer}.1"
        shapes |= {
            f"{attention}.norm1.weight": (latent_width,),
            f"{attention}.norm1.bias": (latent_width,),
            f"{attention}.norm2.weight": (latent_width,),
            f"{attention}.norm2.bias": (latent_width,),
            f"{attention}.to_q.weight": (attention_width, latent_width),
            f"{attention}.to_kv.weight": (2 * attention_width, latent_width),
            f"{attention}.to_out.weight": (latent_width, attention_width),
            f"{feed_forward}.0.weight": (latent_width,),
            f"{feed_forward}.0.bias": (latent_width,),
            f"{feed_forward}.1.weight": (ratio * latent_width, latent_width),
            f"{feed_forward}.3.weight": (latent_width, ratio * latent_width),
        }
    return shapes


def face_id_shapes(width: int, tokens: int = 4, hidden_width: int = 0) -> Shapes:
    """`image_proj` of FaceID; with `hidden_width` of FaceID-Plus."""
    shapes: Shapes = {
        "proj.0.weight": (1024, 512),
        "proj.0.bias": (1024,),
        "proj.2.weight": (tokens * width, 1024),
        "proj.2.bias": (tokens * width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if hidden_width:
        resampler = resampler_shapes(hidden_width, tokens, width, latent_width=width, attention_width=64)
        del resampler["latents"]
        shapes |= {f"perceiver_resampler.{name}": shape for name, shape in resampler.items()}
    return shapes


def layer_shapes(widths: list[int], width: int) -> Shapes:
    """`ip_adapter`: keys and values of every cross-attention layer, for text of `width`."""
    return {
        f"{2 * index + 1}.to_{which}_ip.weight": (layer_width, width)
        for index, layer_width in enumerate(widths)
        for which in "kv"
    }


def lora_shapes(layers: int) -> Shapes:
    """What FaceID files have in `ip_adapter` besides, for every attention layer (of one width here)."""
    return {
        f"{index}.to_{which}_lora.{side}.weight": (8, 8)
        for index in range(2 * layers)
        for which in ("q", "k", "v", "out")
        for side in ("down", "up")
    }


def flat(image_proj: Shapes, ip_adapter: Shapes) -> Shapes:
    """Both groups under their names in a `.safetensors` file."""
    return {
        **{f"image_proj.{name}": shape for name, shape in image_proj.items()},
        **{f"ip_adapter.{name}": shape for name, shape in ip_adapter.items()},
    }


def read(bundle: Path, file: Path) -> AdapterWeights:
    """An adapter file as the base model of a bundle takes it."""
    manifest = Bundle.open(bundle, verify=False).manifest
    return read_adapter(file, manifest.kv_layout, manifest_dimensions(manifest))
