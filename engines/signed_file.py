"""Files beside the plans that NVIDIA's libraries read back, signed as plans are: what others wrote is not read.

A file is: magic, HMAC over its purpose and its content, content. One that does not fit is no error: it is made again.
"""

from __future__ import annotations

import hmac
import os
import tempfile
from pathlib import Path

_MAGIC = b"IPASIGN1"
_MAC_BYTES = 32


class SignedFile:
    """One such file."""

    def __init__(self, path: Path, secret: bytes, purpose: str) -> None:
        """Name it.

        Args:
            path: of the file, which need not exist.
            secret: of the plan cache it lies in.
            purpose: what it is for; what was written for another is not read.
        """
        self.path = path
        self._secret, self._purpose = secret, purpose.encode()

    def read(self) -> bytes | None:
        """The content; `None` if there is none, or if this cache did not write it for this purpose."""
        try:
            written = self.path.read_bytes()
        except OSError:
            return None
        start = len(_MAGIC) + _MAC_BYTES
        content = written[start:]
        return content if hmac.compare_digest(written[:start], _MAGIC + self._mac(content)) else None

    def write(self, content: bytes) -> None:
        """Replace what was there, whole or not at all.

        Raises:
            OSError: the disk is full or failed.
        """
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".", suffix=".partial")  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + self._mac(content) + content)
            Path(name).replace(self.path)
        finally:
            Path(name).unlink(missing_ok=True)

    def _mac(self, content: bytes) -> bytes:
        lengths = len(self._purpose).to_bytes(4, "little")
        return hmac.digest(self._secret, _MAGIC + lengths + self._purpose + content, "sha256")
