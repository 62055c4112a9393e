"""Random Stable Diffusion pipelines of SD1.5's true topology, small enough for tests.

Four UNet blocks with two layers each, 16 cross-attention layers, mid block; several widths, heads whose
size is no power of 2, CLIP text and vision models, a byte-level CLIP tokenizer, the PNDM configuration of SD1.5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from adapter_files import full_face_shapes, resampler_shapes
from diffusers import AutoencoderKL, ControlNetModel, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

TEXT_WIDTH = 48
EMBED_WIDTH = 40
HIDDEN_WIDTH = 32
IMAGE_SIZE = 48
WIDTHS = (24, 48, 72, 96)
HEADS = (2, 4, 3, 4)  # of size 12, 12, 24, 24
WORDS = ("a", "cat", "dog", "on", "the", "grass", "red", "photo", "of", "house")


def tiny_pipeline(
    folder: Path,
    seed: int = 0,
    widths: tuple[int, ...] = WIDTHS,
    heads: int | tuple[int, ...] = HEADS,
    prediction_type: str = "epsilon",
    **unet_options: Any,
) -> Path:
    """Write a pipeline folder as diffusers saves it, `image_encoder` and `feature_extractor` included.

    Args:
        folder: where; made when missing.
        seed: of all weights.
        widths: channels of the four UNet blocks, multiples of 8.
        heads: attention heads, one number or one per block (diffusers calls it `attention_head_dim`).
        prediction_type: of the scheduler's configuration.
        **unet_options: more fields of `UNet2DConditionModel`.
    Returns:
        `folder`.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=heads,
        **unet_options,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=128,
    )
    tokenizer = tiny_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    image_encoder = tiny_image_encoder()
    for model in (unet, vae, text_encoder, image_encoder):
        shake(model)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        image_encoder=image_encoder,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def tiny_image_encoder() -> CLIPVisionModelWithProjection:
    """A CLIP vision model of 3 layers: (48 / 8)^2 patches + CLS = 37 positions of width 32."""
    config = CLIPVisionConfig(
        hidden_size=HIDDEN_WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
        projection_dim=EMBED_WIDTH,
        hidden_act="gelu",
    )
    return CLIPVisionModelWithProjection(config)


def tiny_tokenizer(**options: Any) -> CLIPTokenizer:
    """CLIP's byte-level encoding; the last letters of `WORDS` are merged pair by pair, all else falls into bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        piece = word[-1] + "</w>"
        for letter in reversed(word[:-1]):
            if (letter, piece) not in merges:
                merges.append((letter, piece))
            piece = letter + piece
    tokens = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *(first + second for first, second in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, **options)


def tiny_adapter(
    unet_config: dict[str, Any],
    file: Path,
    tokens: int = 4,
    seed: int = 0,
    embed_width: int = EMBED_WIDTH,
    dtype: torch.dtype = torch.float32,
    kind: str = "base",
    **resampler: int,
) -> Path:
    """Write an IP-Adapter in the official layout, `.safetensors` (flat) or `.bin` (nested).

    Args:
        unet_config: the configuration of the UNet it is for.
        file: its suffix picks the container.
        tokens: image tokens of the kinds base, of which diffusers itself loads only 4, and plus.
        seed: of the weights.
        embed_width: of the image encoder's `image_embeds`.
        dtype: of all tensors.
        kind: `base`, `plus` or `full-face`.
        **resampler: of the kind plus, sizes other than `adapter_files.resampler_shapes`' own.
    Returns:
        `file`.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    width = unet_config["cross_attention_dim"]
    if kind == "base":
        image_proj = {
            "proj.weight": draw(tokens * width, embed_width, scale=embed_width**-0.5),
            "proj.bias": draw(tokens * width),
            "norm.weight": 1 + draw(width, scale=0.2),
            "norm.bias": draw(width, scale=0.2),
        }
    else:
        shapes = (
            resampler_shapes(HIDDEN_WIDTH, tokens, width, **{"latent_width": 40, "attention_width": 128, **resampler})
            if kind == "plus"
            else full_face_shapes(HIDDEN_WIDTH, width)
        )
        image_proj = {
            name: draw(*shape, scale=shape[-1] ** -0.5) if len(shape) > 1 else draw(*shape, scale=0.2)
            for name, shape in shapes.items()
        }
        for name, shape in shapes.items():
            if len(shape) == 1 and name.endswith("weight"):  # of a norm
                image_proj[name] += 1
    ip_adapter: dict[str, torch.Tensor] = {}
    for index, layer_width in enumerate(cross_attention_widths(unet_config)):
        for which in ("k", "v"):
            key = f"{2 * index + 1}.to_{which}_ip.weight"
            ip_adapter[key] = draw(layer_width, width, scale=width**-0.5)
    if file.suffix == ".bin":
        torch.save({"image_proj": image_proj, "ip_adapter": ip_adapter}, file)
    else:
        flat = {f"image_proj.{key}": value for key, value in image_proj.items()}
        flat |= {f"ip_adapter.{key}": value for key, value in ip_adapter.items()}
        save_file(flat, file)
    return file


def tiny_controlnet(base: Path, folder: Path, seed: int = 0, **config: Any) -> Path:
    """Write a random ControlNet for the UNet of a tiny pipeline, one that does something.

    Args:
        base: the pipeline.
        folder: where.
        seed: of what it differs by from the UNet's way down.
        **config: fields of `ControlNetModel` to change.
    Returns:
        `folder`.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", local_files_only=True)
    model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 12, 16, 16))
    if config:
        old = {name: value for name, value in model.config.items() if name != "_use_default_values"}
        model = ControlNetModel.from_config({**old, **config})
    shake(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("controlnet_") and name.endswith("weight"):  # the zero convolutions, too
                parameter.add_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    return folder


def cross_attention_widths(unet_config: dict[str, Any]) -> list[int]:
    """Width of every cross-attention layer: down blocks, up blocks, mid block last."""
    widths, layers = unet_config["block_out_channels"], unet_config["layers_per_block"]
    depths = unet_config.get("transformer_layers_per_block", 1)
    depths = [depths] * len(widths) if isinstance(depths, int) else depths
    downs = zip(widths, unet_config["down_block_types"], depths, strict=True)
    ups = zip(reversed(widths), unet_config["up_block_types"], reversed(depths), strict=True)
    down = [w for w, kind, depth in downs for _ in range(layers * depth) if "Cross" in kind]
    up = [w for w, kind, depth in ups for _ in range((layers + 1) * depth) if "Cross" in kind]
    return [*down, *up, *[widths[-1]] * depths[-1]]


def shake(model: torch.nn.Module) -> None:
    """Move every parameter off its default, so that no bias is 0 and no norm is the identity."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)


def same_weights(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Bit for bit."""
    left, right = found.state_dict(), expected.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def another_vae(base: Path, folder: Path) -> Path:
    """A VAE of the pipeline's sizes, with other weights and another scaling factor."""
    torch.manual_seed(5)
    options = AutoencoderKL.load_config(base / "vae")
    AutoencoderKL.from_config({**options, "scaling_factor": 0.5}).save_pretrained(folder)
    return folder
