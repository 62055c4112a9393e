"""Reading a base model: a diffusers pipeline folder or a model of the Hub, one part at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ipa.engines.errors import IpaError
from ipa.engines.manifest import Defaults, ImageProcessorRecord, VaeRecord

Part = TypeVar("Part")

_HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+(/[\w.\-]+)*")
_FAMILY_CLASSES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
# UNet options that add inputs which the graph does not have.
_UNSUPPORTED = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


@dataclass(frozen=True)
class Source:
    """A folder, local or of the Hub, that holds model parts in sub-folders."""

    location: str
    subfolder: str = ""

    @classmethod
    def parse(cls, text: str, what: str) -> Source:
        """A local folder, or `owner/name` (with `/sub/folder` where needed) of the Hub.

        Raises:
            IpaError: neither.
        """
        if Path(text).is_dir():
            return cls(text)
        if text.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(text):
            raise IpaError(f"{what} {text} is neither a folder nor a Hub id like owner/name")
        owner, name, *rest = text.split("/")
        return cls(f"{owner}/{name}", "/".join(rest))

    def file(self, path: str) -> Path | None:
        """A file's local path; `None` when the source has no such file."""
        path = f"{self.subfolder}/{path}" if self.subfolder else path
        if Path(self.location).is_dir():
            local = Path(self.location) / path
            return local if local.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(hf_hub_download(self.location, path))
        except EntryNotFoundError:
            return None
        except Exception as error:
            raise IpaError(f"cannot fetch {path} of {self.location} from the Hub: {_reason(error)}") from error

    def json(self, path: str) -> dict[str, Any] | None:
        """A JSON object; `None` when the source has no such file."""
        file = self.file(path)
        if file is None:
            return None
        try:
            data = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise IpaError(f"{file} is not readable JSON ({error}); fetch the model again") from error
        if not isinstance(data, dict):
            raise IpaError(f"{file} is not a JSON object; fetch the model again")
        return data

    def load(self, load: Callable[..., Part], part: str) -> Part:
        """Call a `from_pretrained` for one part, in FP32 on the CPU.

        Raises:
            IpaError: it failed, for whatever reason; the message names the part.
        """
        import torch

        subfolder = "/".join(filter(None, (self.subfolder, part)))
        is_local = Path(self.location).is_dir()
        try:
            model = load(self.location, subfolder=subfolder, torch_dtype=torch.float32, local_files_only=is_local)
        except Exception as error:
            raise IpaError(f"cannot load {part or 'the model'} of {self}: {_reason(error)}") from error
        return model

    def __str__(self) -> str:
        return "/".join(filter(None, (self.location, self.subfolder)))


class BasePipeline:
    """A Stable Diffusion 1.x pipeline: configurations read and checked at once, weights when asked for."""

    def __init__(self, base: str, image_encoder: str | None = None) -> None:
        """Read the configurations.

        Args:
            base: pipeline folder or Hub id.
            image_encoder: folder or Hub id of a CLIP vision model with projection; `None`: the pipeline's own.
        Raises:
            IpaError: not such a pipeline, or without an image encoder.
        """
        from transformers import CLIPTextConfig, CLIPVisionConfig  # they know the defaults that files leave out

        self.source = Source.parse(base, "base model")
        index = self.source.json("model_index.json")
        if index is None:
            raise IpaError(f"{base} has no model_index.json; --base takes a pipeline folder in diffusers format")
        if index.get("_class_name") not in _FAMILY_CLASSES:
            raise IpaError(
                f"{base} is a {index.get('_class_name')}, which is not supported yet; expected a Stable Diffusion 1.x "
                f"pipeline ({_FAMILY_CLASSES[0]})"
            )
        if image_encoder is not None:
            self.image_source, self._image_part = Source.parse(image_encoder, "image encoder"), ""
        elif self.source.file("image_encoder/config.json") is not None:
            self.image_source, self._image_part = self.source, "image_encoder"
        else:
            raise IpaError(
                f"{base} has no image_encoder; pass --image-encoder DIR_OR_ID, the CLIP vision model that the adapter "
                "was trained with (for the official SD1.5 adapters h94/IP-Adapter/models/image_encoder)"
            )
        self.unet_config = self._config("unet")
        self.vae_config = self._config("vae")
        self.text_config = CLIPTextConfig.from_dict(self._config("text_encoder")).to_dict()
        self.scheduler_config = self._config("scheduler", "scheduler_config.json")
        prefix = f"{self._image_part}/" if self._image_part else ""
        config = self.image_source.json(f"{prefix}config.json")
        if config is None:
            raise IpaError(f"image encoder {self.image_source} has no config.json")
        self.image_config = CLIPVisionConfig.from_dict(config).to_dict()
        self._check_unet()

    def _config(self, part: str, name: str = "config.json") -> dict[str, Any]:
        config = self.source.json(f"{part}/{name}")
        if config is None:
            raise IpaError(f"{self.source} has no {part}/{name}; the pipeline folder is incomplete")
        return config

    def _check_unet(self) -> None:
        used = [option for option in _UNSUPPORTED if self.unet_config.get(option)]
        if used:
            raise IpaError(f"{self.source}: the unet uses {used[0]}, which is not supported yet")
        widths = self.unet_config.get("cross_attention_dim"), self.text_config["hidden_size"]
        if widths[0] != widths[1]:
            raise IpaError(
                f"{self.source}: the unet wants text of width {widths[0]}, the text encoder gives {widths[1]}"
            )
        channels, latent = self.unet_config.get("in_channels", 4), self.vae_config.get("latent_channels", 4)
        if channels != latent:
            raise IpaError(
                f"{self.source}: the unet takes {channels} channels and latents have {latent}; "
                "inpainting models are not supported yet"
            )

    def load_unet(self) -> Any:
        """The `UNet2DConditionModel`."""
        from diffusers import UNet2DConditionModel

        return _frozen(self.source.load(UNet2DConditionModel.from_pretrained, "unet"))

    def load_vae(self) -> Any:
        """The `AutoencoderKL`."""
        from diffusers import AutoencoderKL

        return _frozen(self.source.load(AutoencoderKL.from_pretrained, "vae"))

    def load_text_encoder(self) -> Any:
        """The `CLIPTextModel`."""
        from transformers import CLIPTextModel

        return _frozen(self.source.load(CLIPTextModel.from_pretrained, "text_encoder"))

    def load_image_encoder(self) -> Any:
        """The `CLIPVisionModelWithProjection`."""
        from transformers import CLIPVisionModelWithProjection

        return _frozen(self.image_source.load(CLIPVisionModelWithProjection.from_pretrained, self._image_part))

    def load_tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer`; its padding section holds length and token to pad with."""
        from transformers import CLIPTokenizer

        # transformers makes an empty tokenizer of a folder that has no vocabulary
        if not any(self.source.file(f"tokenizer/{name}") for name in ("tokenizer.json", "vocab.json")):
            raise IpaError(f"{self.source} has no tokenizer/tokenizer.json; the pipeline folder is incomplete")
        tokenizer = self.source.load(_without_dtype(CLIPTokenizer.from_pretrained), "tokenizer")
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.enable_padding(length=self.text_tokens, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
        return backend

    @property
    def text_tokens(self) -> int:
        """Tokens of a prompt: 77."""
        return int(self.text_config["max_position_embeddings"])

    @property
    def vae_record(self) -> VaeRecord:
        """Scaling factor, and pixels per latent."""
        blocks = self.vae_config.get("block_out_channels", (0,))
        return VaeRecord(float(self.vae_config.get("scaling_factor", 0.18215)), 2 ** (len(blocks) - 1))

    @property
    def image_processor(self) -> ImageProcessorRecord:
        """CLIP preprocessing: the image encoder's own file, else the pipeline's, else CLIP's values."""
        size = int(self.image_config["image_size"])
        own = self.image_source.json(f"{self._image_part}/preprocessor_config.json".lstrip("/"))
        for config in (own, self.source.json("feature_extractor/preprocessor_config.json")):
            if config is not None and _edge(config.get("crop_size")) == _edge(config.get("size")) == size:
                if config.get("resample", _BICUBIC) != _BICUBIC:
                    raise IpaError(f"{self.source}: images are not resized bicubically, which is not supported yet")
                mean, std = config.get("image_mean", _CLIP_MEAN), config.get("image_std", _CLIP_STD)
                return ImageProcessorRecord(size, _triple(mean), _triple(std))
        return ImageProcessorRecord(size, _CLIP_MEAN, _CLIP_STD)

    @property
    def defaults(self) -> Defaults:
        """The size the UNet was trained at."""
        sample_size, downscale = self.unet_config.get("sample_size") or 64, self.vae_record.downscale
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        return Defaults(height=height * downscale, width=width * downscale)


def _edge(size: Any) -> int | None:
    """The edge of a processor's `size` or `crop_size`, which come as a number or as a mapping."""
    if isinstance(size, dict):
        edges = {size[key] for key in ("shortest_edge", "height", "width") if key in size}
        return edges.pop() if len(edges) == 1 else None
    return size if isinstance(size, int) else None


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _frozen(model: Any) -> Any:
    return model.eval().requires_grad_(False)


def _without_dtype(load: Callable[..., Part]) -> Callable[..., Part]:
    """A tokenizer's `from_pretrained`, which takes no dtype."""

    def load_tokenizer(location: str, subfolder: str, local_files_only: bool, **_: Any) -> Part:
        return load(location, subfolder=subfolder, local_files_only=local_files_only)

    return load_tokenizer


def _reason(error: Exception) -> str:
    """The first line of a library's message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
