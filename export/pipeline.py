"""Reading a base model: a diffusers pipeline, of a folder or the Hub, or a checkpoint file, one part at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ipa.engines.bundle import hash_file
from ipa.engines.errors import IpaError
from ipa.engines.manifest import Defaults, SourceRecord, VaeRecord
from ipa.engines.spec import SDXL
from ipa.export.changes import BaseChanges
from ipa.export.clip_tokenizer import clip_tokenizer
from ipa.export.family import check_unet, family_of
from ipa.export.hoist import config_kv_layout
from ipa.export.image_encoder import load_image_encoder, read_image_config
from ipa.export.image_preprocessing import image_processor
from ipa.export.lora import read_lora
from ipa.export.single_file import CLIP_MERGES, CONFIGS, Checkpoint, is_checkpoint
from ipa.export.source import Source, reading
from ipa.export.textual_inversion import add_embeddings, add_tokens, read_textual_inversion
from ipa.export.vae_source import VaeSource, check_vae

_SDXL_GUIDANCE_SCALE = 5.0
_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


class BasePipeline:
    """A Stable Diffusion 1.x or XL pipeline: configurations read and checked at once, weights when asked for."""

    def __init__(self, base: str, image_encoder: str | None = None, changes: BaseChanges | None = None) -> None:
        """Read the configurations, and the files of `changes`.

        Args:
            base: pipeline folder, Hub id or checkpoint file.
            image_encoder: folder or Hub id of a CLIP vision model with projection; `None`: the pipeline's own.
            changes: what to change in it; `None`: nothing.
        Raises:
            IpaError: not such a pipeline, without an image encoder, or a change does not fit it.
        """
        from transformers import CLIPTextConfig  # it knows the defaults that files leave out

        changes = changes or BaseChanges()
        self._checkpoint = Checkpoint(Path(base)) if is_checkpoint(base) else None
        if self._checkpoint is not None:
            self.source = Source(str(changes.config or CONFIGS[self._checkpoint.family]))
        elif changes.config is not None:
            raise IpaError(f"--config goes with a checkpoint file as --base; {base} has configurations of its own")
        else:
            self.source = Source.parse(base, "base model")
        index = self.source.json("model_index.json")
        if index is None:
            raise IpaError(
                f"{self.source} has no model_index.json; --base takes a pipeline folder in diffusers format or a "
                "checkpoint file, --config a folder of the same format"
            )
        self.family = family_of(base, index)
        self.force_zeros_for_empty_prompt = self.family == SDXL and bool(
            index.get("force_zeros_for_empty_prompt", True)
        )
        if image_encoder is not None:
            self.image_source, self._image_part = Source.parse(image_encoder, "image encoder"), ""
        elif self.source.file("image_encoder/config.json") is not None:
            self.image_source, self._image_part = self.source, "image_encoder"
        else:
            raise IpaError(
                f"{base} has no image_encoder; pass --image-encoder DIR_OR_ID, the CLIP vision model that the adapter "
                "was trained with (for the official adapters h94/IP-Adapter/models/image_encoder; for ip-adapter_sdxl "
                "h94/IP-Adapter/sdxl_models/image_encoder)"
            )
        self.unet_config = self._config("unet")
        self._vae = VaeSource(changes.vae, self._file("vae")) if changes.vae else None
        self.vae_config = self._config("vae") if self._vae is None else self._vae.config
        check_vae(self.source, self.vae_config)
        with reading(f"{self.source}/vae/config.json" if self._vae is None else f"{changes.vae}: its config.json"):
            self.vae_record = _vae_record(self.vae_config)
        parts = ("text_encoder", "text_encoder_2") if self.family == SDXL else ("text_encoder",)
        self.text_configs: dict[str, dict[str, Any]] = {}
        for part in parts:
            with reading(f"{self.source}/{part}/config.json"):
                self.text_configs[part] = CLIPTextConfig.from_dict(self._config(part)).to_dict()
        self.text_config = self.text_configs["text_encoder"]
        self.scheduler_config = self._config("scheduler", "scheduler_config.json")
        self.image_config = read_image_config(self.image_source, self._image_part)
        size = self.image_config["image_size"]
        self.image_processor = image_processor(self.image_source, self._image_part, self.source, size)
        with reading(f"{self.source}/unet/config.json"):
            self._check_unet()
            self.kv_layout = config_kv_layout(self.unet_config)
            self.defaults = self._defaults()
        if self._checkpoint is not None:
            needed = (*parts, *(() if self._vae else ("vae",)))
            self._checkpoint.check(self.family, needed, self.source, self.scheduler_config)
        self._read_changes(changes)

    def _read_changes(self, changes: BaseChanges) -> None:
        layers = min(int(config["num_hidden_layers"]) for config in self.text_configs.values())
        if not 0 <= changes.clip_skip < layers:
            raise IpaError(f"--clip-skip {changes.clip_skip}: {self.source}'s text encoder has {layers} layers")
        self.clip_skip = changes.clip_skip
        widths = {part: int(config["hidden_size"]) for part, config in self.text_configs.items()}
        self._inversions = [read_textual_inversion(file, widths) for file in changes.textual_inversions]
        self.textual_inversions = tuple(inversion.record for inversion in self._inversions)
        self._token_ids: dict[str, list[int]] = {}  # of the new words, by text encoder
        if self._inversions:
            for part, config in self.text_configs.items():
                self._tokenizer(_TOKENIZERS[part])
                config["vocab_size"] = max(config["vocab_size"], *(index + 1 for index in self._token_ids[part]))
        self._loras = [read_lora(file, self.family) for file in changes.loras]
        self.loras = tuple(lora.record for lora in self._loras)
        if self._loras:
            self._check_loras()

    def _check_loras(self) -> None:
        """Before the minutes that an export takes: models without weights know their layers."""
        import torch
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextConfig

        with torch.device("meta"):
            models = {
                part: _text_class(part)(CLIPTextConfig.from_dict(config)) for part, config in self.text_configs.items()
            }
            models["unet"] = UNet2DConditionModel.from_config(self.unet_config)
        for lora in self._loras:
            lora.check(models)

    def _file(self, part: str, name: str = "config.json") -> Path:
        file = self.source.file(f"{part}/{name}")
        if file is None:
            raise IpaError(f"{self.source} has no {part}/{name}; the pipeline folder is incomplete")
        return file

    def _config(self, part: str, name: str = "config.json") -> dict[str, Any]:
        self._file(part, name)
        return self.source.json(f"{part}/{name}") or {}

    def _check_unet(self) -> None:
        check_unet(self.source, self.family, self.unet_config, self.text_width, self.text_embed_width)
        lengths = {config["max_position_embeddings"] for config in self.text_configs.values()}
        if len(lengths) > 1:
            raise IpaError(f"{self.source}: the text encoders take {' and '.join(map(str, lengths))} tokens, not alike")
        channels, latent = self.unet_config.get("in_channels", 4), self.vae_config.get("latent_channels", 4)
        if channels not in (latent, 2 * latent + 1):
            raise IpaError(
                f"{self.source}: the unet takes {channels} channels, expected {latent}, as the vae's latents have, or "
                f"{2 * latent + 1} of an inpainting model (with a mask and a masked picture)"
            )

    def load_unet(self) -> Any:
        """The `UNet2DConditionModel`, LoRAs added."""
        from diffusers import UNet2DConditionModel

        if self._checkpoint is not None:
            unet = self._checkpoint.load_unet(self._file("unet").parent)
        else:
            unet = self.source.load(UNet2DConditionModel.from_pretrained, "unet")
        for lora in self._loras:
            lora.fuse("unet", unet)
        return _frozen(unet)

    def load_vae(self) -> Any:
        """The `AutoencoderKL`."""
        from diffusers import AutoencoderKL

        if self._vae is not None:
            return _frozen(self._vae.load())
        if self._checkpoint is not None:
            return _frozen(self._checkpoint.load_vae(self._file("vae").parent))
        return _frozen(self.source.load(AutoencoderKL.from_pretrained, "vae"))

    def load_text_encoder(self) -> Any:
        """The `CLIPTextModel`: LoRAs and new words added, without the layers that are skipped.

        Its last hidden state is diffusers' prompt embedding for `clip_skip` (in Stable Diffusion XL, which leaves the
        last layer out, the state before): the final norm of the last layer left.
        """
        model = self._load_text("text_encoder")
        if self.clip_skip:
            text_model = getattr(model, "text_model", model)  # transformers before 5.6 has one level more
            text_model.encoder.layers = text_model.encoder.layers[: -self.clip_skip]
        return _frozen(model)

    def load_text_encoder_2(self) -> Any:
        """SDXL's `CLIPTextModelWithProjection`, changed alike, with all its layers: the pooled text is of the last."""
        return _frozen(self._load_text("text_encoder_2"))

    def _load_text(self, part: str) -> Any:
        if self._checkpoint is not None:
            model = self._checkpoint.load_text_encoder(self._file(part).parent, part)
        else:
            model = self.source.load(_text_class(part).from_pretrained, part)
        for lora in self._loras:
            lora.fuse(part, model)
        if self._inversions:
            add_embeddings(model, part, self._inversions, self._token_ids[part])
        return model

    def load_image_encoder(self) -> Any:
        """The `CLIPVisionModelWithProjection`."""
        return _frozen(load_image_encoder(self.image_source, self._image_part, self.image_config))

    def load_tokenizer(self, part: str = "tokenizer") -> Any:
        """The `tokenizers.Tokenizer`, new words added; its padding section holds length and token to pad with.

        Args:
            part: `tokenizer`, or `tokenizer_2` in SDXL, which pads with another token.
        """
        tokenizer = self._tokenizer(part)
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.enable_padding(length=self.text_tokens, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
        return backend

    def _tokenizer(self, part: str = "tokenizer") -> Any:
        """The `CLIPTokenizer` with the new words, whose ids are kept."""
        from transformers import CLIPTokenizer

        # transformers makes an empty tokenizer of a folder that has no vocabulary
        if any(self.source.file(f"{part}/{name}") for name in ("tokenizer.json", "vocab.json")):
            tokenizer = self.source.load_tokenizer(CLIPTokenizer.from_pretrained, part)
        elif merges := self.source.file(f"{part}/merges.txt") or self._shipped_merges():
            padding = (self.source.json(f"{part}/tokenizer_config.json") or {}).get("pad_token")
            tokenizer = clip_tokenizer(merges, self.text_tokens, **({"pad_token": padding} if padding else {}))
        else:
            raise IpaError(f"{self.source} has no {part}/tokenizer.json; the pipeline folder is incomplete")
        ids = add_tokens(tokenizer, self._inversions)
        self._token_ids |= {encoder: ids for encoder, name in _TOKENIZERS.items() if name == part}
        return tokenizer

    def _shipped_merges(self) -> Path | None:
        return CLIP_MERGES if self.source.location in map(str, CONFIGS.values()) else None

    @property
    def sources(self) -> dict[str, SourceRecord]:
        """Where the weights came from that a user named one by one."""
        found = {}
        if self._checkpoint is not None:
            found["checkpoint"] = SourceRecord(self._checkpoint.path.name, hash_file(self._checkpoint.path))
        if self._vae is not None:
            found["vae"] = self._vae.record
        return found

    @property
    def text_width(self) -> int:
        """Of the text encoders' states, side by side where there are two."""
        return sum(int(config["hidden_size"]) for config in self.text_configs.values())

    @property
    def text_embed_width(self) -> int:
        """Of SDXL's pooled text; 0 in other families."""
        return int(self.text_configs["text_encoder_2"]["projection_dim"]) if self.family == SDXL else 0

    @property
    def needs_float32_vae(self) -> bool:
        """Whether the VAE overflows in half precision: SDXL's own does, and says so; repaired ones say the contrary.

        diffusers' SDXL pipelines read this option, those of Stable Diffusion 1.x do not, though it is set there, too.
        """
        return self.family == SDXL and bool(self.vae_config.get("force_upcast", True))

    @property
    def text_tokens(self) -> int:
        """Tokens of a prompt: 77."""
        return int(self.text_config["max_position_embeddings"])

    def _defaults(self) -> Defaults:
        """The size the UNet was trained at; the guidance scale is that of diffusers' pipeline for the family."""
        sample_size, downscale = self.unet_config.get("sample_size") or 64, self.vae_record.downscale
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        defaults = Defaults(height=height * downscale, width=width * downscale)
        return replace(defaults, guidance_scale=_SDXL_GUIDANCE_SCALE) if self.family == SDXL else defaults


def _vae_record(config: Mapping[str, Any]) -> VaeRecord:
    """Scaling factor, and pixels per latent."""
    blocks = config.get("block_out_channels", (0,))
    return VaeRecord(float(config.get("scaling_factor", 0.18215)), 2 ** (len(blocks) - 1))


def _text_class(part: str) -> Any:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel


def _frozen(model: Any) -> Any:
    return model.eval().requires_grad_(False)
