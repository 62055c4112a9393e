"""Checkpoints that are one file, in the original layout of Stable Diffusion 1.x and XL: read one part at a time.

diffusers converts the names. It takes the configurations from a folder, ours or the user's, never from the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ipa.engines.errors import IpaError, first_line
from ipa.engines.spec import SD15, SDXL
from ipa.export.family import TITLES
from ipa.export.weight_files import SUFFIXES, check_file, damaged, named_tensors, read_weights

_ASSETS = Path(str(files("ipa.export") / "assets"))
CONFIGS = {SD15: _ASSETS / "sd15", SDXL: _ASSETS / "sdxl"}  # as published with Stable Diffusion 1.5 and XL base 1.0
CLIP_MERGES = CONFIGS[SD15] / "tokenizer" / "merges.txt"  # those of every tokenizer, which differ in what they pad with
_UNET, _VAE, _TEXT_2 = "model.diffusion_model.", "first_stage_model.", "conditioner.embedders.1.model."
_TEXT = {SD15: "cond_stage_model.transformer.", SDXL: "conditioner.embedders.0.transformer."}
_PARTS = {
    SD15: {"unet": _UNET, "vae": _VAE, "text_encoder": _TEXT[SD15]},
    SDXL: {"unet": _UNET, "vae": _VAE, "text_encoder": _TEXT[SDXL], "text_encoder_2": _TEXT_2},
}
_CONV_IN = f"{_UNET}input_blocks.0.0.weight"
_XL_NAMES = ("conditioner.embedders.", f"{_UNET}label_emb.")  # text encoders, and the embedding of sizes
# By names that the families above do not have.
_OTHERS = {
    "cond_stage_model.model.": "Stable Diffusion 2.x",
    "conditioner.embedders.0.model.": "a refiner of Stable Diffusion XL",
    "edm_mean": "Playground v2.5",
}
# An empty tensor, by which fine-tunes of Stable Diffusion XL say that they predict v (arXiv:2202.00512).
_V_KEY, _V_PREDICTION = "v_pred", "v_prediction"
_LATENT_CHANNELS = 4
_VAE_GROUPS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Some early fine-tunes left a level of CLIP's names out.
_OLD_TEXT_GROUPS = ("embeddings.", "encoder.", "final_layer_norm.")


def is_checkpoint(base: str) -> bool:
    """Whether a base model is named as a single file."""
    return Path(base).is_file() or Path(base).suffix in SUFFIXES


class Checkpoint:
    """A checkpoint file of Stable Diffusion 1.x or XL; its weights are read when a part is loaded.

    Attributes:
        family: `sd15` or `sdxl`.
        parts: that it has weights of, as a pipeline folder names them.
    """

    def __init__(self, path: Path) -> None:
        """Read the names and shapes.

        Raises:
            IpaError: the file is missing, damaged, unsafe, or of a family that is not supported.
        """
        check_file(path, "base model")
        self.path = path
        # A pickle is mapped into memory, so that its tensors cost nothing before they are used.
        self._pickled = None if path.suffix == ".safetensors" else self._read_pickle()
        shapes = self._shapes()
        self._refuse_others(shapes)
        self.family = SDXL if any(name.startswith(_XL_NAMES) for name in shapes) else SD15
        prefixes = _PARTS[self.family].items()
        self.parts = {part for part, prefix in prefixes if any(name.startswith(prefix) for name in shapes)}
        self._predicts_v = _V_KEY in shapes

    def _refuse_others(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        found = (title for prefix, title in _OTHERS.items() if any(name.startswith(prefix) for name in shapes))
        family = next(found, None)
        channels = shapes.get(_CONV_IN, (0, 0))[1]
        if family is None and channels == 0:
            raise IpaError(
                f"base model {self.path} has no {_CONV_IN}, so it is no Stable Diffusion checkpoint; --base takes one "
                "in the original layout, or a pipeline folder"
            )
        if family is None and channels != _LATENT_CHANNELS:
            family = "an inpainting model" if channels == 9 else f"a model that takes {channels} channels"
        if family is not None:
            raise IpaError(
                f"base model {self.path} is {family}, which is not supported yet as a single file; expected Stable "
                "Diffusion 1.x or the base model of XL, or a pipeline folder in diffusers format"
            )

    def check(self, family: str, needed: Sequence[str], source: object, scheduler_config: Mapping[str, Any]) -> None:
        """Refuse configurations that are not this checkpoint's, and parts that have no weights.

        Args:
            family: of the configurations.
            needed: parts to be loaded from here beside the UNet.
            source: of the configurations, for messages.
            scheduler_config: among them.
        Raises:
            IpaError: names what does not fit.
        """
        what = f"base model {self.path}"
        if family != self.family:
            raise IpaError(
                f"{what} is {TITLES[self.family]}, the configurations in {source} are of {TITLES[family]}; leave "
                "--config out, or name those of this checkpoint"
            )
        if missing := [part for part in needed if part not in self.parts]:
            advice = "name one with --vae" if missing[0] == "vae" else "use a complete checkpoint"
            raise IpaError(f"{what} has no {missing[0]} weights; {advice}")
        if self._predicts_v and scheduler_config.get("prediction_type") != _V_PREDICTION:
            raise IpaError(
                f"{what} predicts v (it has {_V_KEY}), the scheduler in {source} is for a model that predicts the "
                f"noise; name a folder with --config DIR whose scheduler has prediction_type {_V_PREDICTION}"
            )

    def _read_pickle(self) -> dict[str, Tensor]:
        return named_tensors(read_weights(self.path, "base model"), self.path, "base model")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        if self._pickled is not None:
            return {name: tuple(tensor.shape) for name, tensor in self._pickled.items()}
        try:
            with safe_open(self.path, "pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise damaged(self.path, "base model") from error

    def _tensors(self, prefix: str) -> dict[str, Tensor]:
        if self._pickled is not None:
            return {name: tensor for name, tensor in self._pickled.items() if name.startswith(prefix)}
        with safe_open(self.path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118

    def load_unet(self, config: Path) -> Any:
        """The `UNet2DConditionModel`; `config` is the folder of its `config.json`."""
        from diffusers import UNet2DConditionModel

        return _loaded(UNet2DConditionModel.from_single_file, self._tensors(_UNET), config, f"unet of {self.path}")

    def load_vae(self, config: Path) -> Any:
        """The `AutoencoderKL`; `config` is the folder of its `config.json`."""
        from diffusers import AutoencoderKL

        return _loaded(AutoencoderKL.from_single_file, self._tensors(_VAE), config, f"vae of {self.path}")

    def load_text_encoder(self, config: Path, part: str = "text_encoder") -> Any:
        """The `CLIPTextModel`; `config` is the folder of its `config.json`.

        Args:
            part: `text_encoder`, or Stable Diffusion XL's `text_encoder_2`, a `CLIPTextModelWithProjection`.
        """
        from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        kind = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel

        def load(tensors: dict[str, Tensor], **options: Any) -> Any:
            return create_diffusers_clip_model_from_ldm(kind, tensors, **options)

        tensors = self._tensors(_PARTS[self.family][part])
        named = {_text_name(name, _TEXT[self.family]): tensor for name, tensor in tensors.items()}
        return _loaded(load, named, config, f"{part} of {self.path}")


def load_vae_file(path: Path, config: Path) -> Any:
    """The `AutoencoderKL` of a file, in the original layout or in diffusers'.

    Args:
        config: folder of its `config.json`.
    Raises:
        IpaError: the file is missing, damaged or unsafe, or holds no such VAE.
    """
    from diffusers import AutoencoderKL

    tensors = named_tensors(read_weights(path, "vae"), path, "vae")
    named = {_new_attention_name(name.removeprefix(_VAE)): tensor for name, tensor in tensors.items()}
    wanted = {name: tensor for name, tensor in named.items() if name.startswith(_VAE_GROUPS)}
    if not wanted:
        raise IpaError(f"vae {path} has no encoder.* and decoder.* weights, so it is no VAE of Stable Diffusion")
    return _loaded(AutoencoderKL.from_single_file, wanted, config, f"vae {path}", "use one made for this base model")


def _new_attention_name(name: str) -> str:
    """The name of a weight since diffusers 0.17; older files, sd-vae-ft-mse among them, have other ones."""
    *parents, layer, kind = name.split(".")
    return ".".join([*parents, _OLD_ATTENTION.get(layer, layer), kind]) if "attentions" in parents else name


def _text_name(name: str, prefix: str) -> str:
    rest = name.removeprefix(prefix)
    return f"{prefix}text_model.{rest}" if rest != name and rest.startswith(_OLD_TEXT_GROUPS) else name


def _loaded(
    load: Callable[..., Any],
    tensors: dict[str, Tensor],
    config: Path,
    what: str,
    advice: str = "name the configurations of this checkpoint with --config DIR",
) -> Any:
    """Convert and load, in FP32 on the CPU; every weight of the model must be there."""
    try:
        model = load(tensors, config=str(config), torch_dtype=torch.float32, local_files_only=True)
    except Exception as error:
        raise IpaError(
            f"cannot load the {what} with the configuration in {config}: {first_line(error)}; {advice}"
        ) from error
    if missing := _missing(model):
        raise IpaError(f"cannot load the {what}: it misses {min(missing)}; the file is incomplete, or {advice}")
    return model


def _missing(model: nn.Module) -> list[str]:
    """What no weight was found for: it stays on the meta device."""
    named: Iterable[tuple[str, Tensor]] = model.named_parameters()
    return [name for name, parameter in named if parameter.is_meta]
