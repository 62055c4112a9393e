"""Where model parts are read from: a folder, local or of the Hub."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ipa.engines.errors import IpaError, first_line
from ipa.trainer.pickles import REFUSED

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

    def load(self, load: Callable[..., Any], part: str, **options: Any) -> Any:
        """Call a model's `from_pretrained` for one part, in FP32 on the CPU.

        Args:
            load: of a class of diffusers or transformers.
            part: sub-folder.
            **options: more that it is to be called with.
        Raises:
            IpaError: it failed, for whatever reason, or some weights are missing; the message names the part.
        """
        model, info = self._call(load, part, torch_dtype=torch.float32, output_loading_info=True, **options)
        buffers = {name for name, _ in model.named_buffers()}  # positions, which files hold or not
        if missing := sorted(set(info["missing_keys"]) - buffers):
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise IpaError(
                f"cannot load {part or 'the model'} of {self}: its weights miss {missing[0]}{others}; they are "
                f"incomplete, or not of a model of class {type(model).__name__}"
            )
        return model

    def load_tokenizer(self, load: Callable[..., Any], part: str) -> Any:
        """Call a tokenizer's `from_pretrained`.

        Raises:
            IpaError: it failed.
        """
        return self._call(load, part)

    def _call(self, load: Callable[..., Any], part: str, **options: Any) -> Any:
        subfolder = "/".join(filter(None, (self.subfolder, part)))
        is_local = Path(self.location).is_dir()
        try:
            return load(self.location, subfolder=subfolder, local_files_only=is_local, **options)
        except Exception as error:
            # What the library says of a pickle that it refuses is how to run its code.
            is_refused = any(isinstance(cause, pickle.UnpicklingError) for cause in _causes(error))
            reason = REFUSED if is_refused else first_line(error) or type(error).__name__
            raise IpaError(f"cannot load {part or 'the model'} of {self}: {reason}") from error

    def __str__(self) -> str:
        return "/".join(filter(None, (self.location, self.subfolder)))


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn whatever a malformed configuration makes fail into one message that names the file.

    Raises:
        IpaError: in place of any other exception.
    """
    try:
        yield
    except IpaError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise IpaError(f"{where} is no configuration that can be used ({reason}); fetch the model again") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised for."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
