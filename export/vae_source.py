"""Another VAE than the base model's: a folder, a Hub id or a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipa.engines.bundle import hash_file
from ipa.engines.errors import IpaError
from ipa.engines.manifest import SourceRecord
from ipa.export.single_file import load_vae_file
from ipa.export.source import Source
from ipa.export.weight_files import SUFFIXES, check_file

_CLASS = "AutoencoderKL"
# What diffusers subtracts or divides by beside the scaling factor, in VAEs of later families.
_UNSUPPORTED = ("shift_factor", "latents_mean", "latents_std")


def check_vae(source: object, config: Mapping[str, Any]) -> None:
    """Refuse a VAE whose latents differ from the UNet's by more than a factor.

    Args:
        source: for the message.
        config: of the VAE.
    Raises:
        IpaError: names the option.
    """
    if used := [option for option in _UNSUPPORTED if config.get(option) is not None]:
        raise IpaError(
            f"{source}: its vae has a {used[0]}, which is not supported; expected one of Stable Diffusion 1.x or XL, "
            "whose latents have a scaling factor alone"
        )


class VaeSource:
    """Where a VAE is read from.

    Attributes:
        config: its configuration, scaling factor included.
    """

    def __init__(self, vae: str, own_config: Path) -> None:
        """Read the configuration.

        Args:
            vae: folder or Hub id of a VAE, or of a pipeline that has one; or a file, which says neither sizes nor
                scaling factor and is taken to have those of the base model.
            own_config: the base model's `vae/config.json`.
        Raises:
            IpaError: there is no VAE of Stable Diffusion's kind.
        """
        self._file = Path(vae) if Path(vae).is_file() or Path(vae).suffix in SUFFIXES else None
        self._own_config = own_config
        self._part = ""
        if self._file is not None:
            check_file(self._file, "vae")
            self._source = Source(str(own_config.parent))
        else:
            self._source = Source.parse(vae, "vae")
            if self._source.file("config.json") is None:
                self._part = "vae"
        config = self._source.json(f"{self._part}/config.json".lstrip("/"))
        if config is None:
            raise IpaError(
                f"vae {vae} has no config.json; --vae takes the folder or Hub id of a VAE, or its weight file"
            )
        if config.get("_class_name", _CLASS) != _CLASS:
            raise IpaError(f"vae {vae} is a {config['_class_name']}, which is not supported; expected an {_CLASS}")
        check_vae(f"vae {vae}", config)
        self.config: dict[str, Any] = config

    @property
    def record(self) -> SourceRecord:
        """For the manifest: no local path, only the last name of it."""
        if self._file is not None:
            return SourceRecord(self._file.name, hash_file(self._file))
        is_local = Path(self._source.location).is_dir()
        return SourceRecord(Path(self._source.location).resolve().name if is_local else str(self._source))

    def load(self) -> Any:
        """The `AutoencoderKL`, in FP32."""
        from diffusers import AutoencoderKL

        if self._file is not None:
            return load_vae_file(self._file, self._own_config.parent)
        return self._source.load(AutoencoderKL.from_pretrained, self._part)
