"""Names of the UNet's layers in Stable Diffusion XL's original code (sgm), as kohya's LoRA files spell them.

kohya trains XL on the original UNet, and 1.x on diffusers'. All names here have underscores for dots.
"""

from __future__ import annotations

import re

_BLOCK = re.compile(r"(?P<side>input|output)_blocks_(?P<number>\d+)_(?P<entry>\d+)_(?P<rest>.+)")
_MIDDLE = re.compile(r"middle_block_(?P<number>[012])_(?P<rest>.+)")
_MIDDLE_PARTS = ("resnets_0", "attentions_0", "resnets_1")
_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}


def diffusers_name(layer: str, layers_per_block: int) -> str:
    """A UNet layer's name in diffusers, underscores for dots; names that are not sgm's stay as they are.

    Args:
        layers_per_block: of the UNet: sgm counts the layers of all blocks on, each block with one entry more, which
            on the way down is the downsampler.
    """
    if layer in _OUTSIDE:
        return _OUTSIDE[layer]
    if middle := _MIDDLE.fullmatch(layer):
        return f"mid_block_{_MIDDLE_PARTS[int(middle['number'])]}_{_RESNET.get(middle['rest'], middle['rest'])}"
    match = _BLOCK.fullmatch(layer)
    if match is None:
        return layer
    is_down, rest = match["side"] == "input", match["rest"]
    block, index = divmod(int(match["number"]) - is_down, layers_per_block + 1)
    prefix = f"{'down' if is_down else 'up'}_blocks_{block}"
    if rest in ("op", "conv"):  # the upsampler is the last entry of its block's last layer
        return f"{prefix}_{'downsamplers' if is_down else 'upsamplers'}_0_conv"
    if match["entry"] == "0":
        return f"{prefix}_resnets_{index}_{_RESNET.get(rest, rest)}"
    return f"{prefix}_attentions_{index}_{rest}"
