"""Whether PyTorch is given what a bundle was made of: a comparison of two models says nothing of an engine."""

from __future__ import annotations

from pathlib import Path

from ipa.engines.bundle import Bundle, hash_file
from ipa.engines.errors import IpaError
from ipa.engines.manifest import Manifest


def source_folder(option: str, text: str, file: str) -> Path:
    """A model's folder on this machine: one that is named, or a Hub id's in the Hub's cache, where the export left it.

    Args:
        option: for the message.
        text: a folder, or `owner/name` with `/sub/folder` where needed.
        file: that the model has.
    Raises:
        IpaError: there is none.
    """
    from huggingface_hub import try_to_load_from_cache

    from ipa.export.source import Source

    source = Source.parse(text, option)
    if Path(source.location).is_dir():
        return Path(text)
    found = try_to_load_from_cache(source.location, "/".join(filter(None, (source.subfolder, file))))
    if not isinstance(found, str):
        raise IpaError(
            f"{option} {text}: no such folder, and the Hub's cache on this machine, where `ipa-export` leaves what it "
            f"fetches, has no {file} of it; name a folder"
        )
    return Path(found).parent


def check_adapter(bundle: Bundle, file: Path) -> None:
    """Compare an adapter file with the one that the bundle's default adapter was made of.

    Raises:
        IpaError: it is another, or the bundle has no adapter.
    """
    name = bundle.manifest.defaults.adapter
    record, found = bundle.adapter(name), hash_file(file)
    if found != record.source_sha256:
        raise IpaError(
            f"--adapter {file}: sha256 {found[:16]}..., but adapter '{name}' of {bundle.root} was made of one with "
            f"{record.source_sha256[:16]}...; name that one (`ipa-export inspect {bundle.root}` lists them)"
        )


def torch_obstacle(manifest: Manifest) -> str:
    """Why PyTorch cannot draw with a bundle's model from a pipeline folder and an adapter alone; empty: it can."""
    changes = {
        "a checkpoint file in the original layout": "checkpoint" in manifest.sources,
        "a VAE of its own": "vae" in manifest.sources,
        "LoRAs": bool(manifest.loras),
        "textual inversions": bool(manifest.textual_inversions),
        "clip_skip": bool(manifest.clip_skip),
    }
    if found := [name for name, is_there in changes.items() if is_there]:
        return f"the bundle was made with {', '.join(found)}, which --base DIR does not have"
    return ""
