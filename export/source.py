"""Where model parts are read from: a folder, local or of the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ipa.engines.errors import IpaError, first_line

Part = TypeVar("Part")

_HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+(/[\w.\-]+)*")


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
            raise IpaError(
                f"cannot fetch {path} of {self.location} from the Hub: {first_line(error) or type(error).__name__}"
            ) from error

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
            raise IpaError(
                f"cannot load {part or 'the model'} of {self}: {first_line(error) or type(error).__name__}"
            ) from error
        return model

    def __str__(self) -> str:
        return "/".join(filter(None, (self.location, self.subfolder)))
