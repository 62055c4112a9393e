"""Files beside the plans are read only as this user's cache wrote them. In use: test_engines_device_loop.py."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ipa.engines.signed_file import SignedFile

KERNELS = bytes(range(256)) * 8


@pytest.fixture
def file(tmp_path: Path) -> SignedFile:
    kept = SignedFile(tmp_path / "unet.kernels", b"s" * 32, "key")
    kept.write(KERNELS)
    return kept


def test_what_was_written_is_read(file: SignedFile, tmp_path: Path) -> None:
    assert file.read() == KERNELS
    assert file.path.stat().st_mode & 0o777 == 0o600
    file.write(b"others")
    assert file.read() == b"others"
    assert [path.name for path in tmp_path.iterdir()] == ["unet.kernels"]


def test_nothing_else_is(file: SignedFile) -> None:
    content = file.path.read_bytes()
    draw = random.Random(0)
    for _ in range(1000):
        changed = bytearray(content)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        file.path.write_bytes(changed)
        assert file.read() is None
    for _ in range(300):
        file.path.write_bytes(content[: draw.randrange(len(content))])
        assert file.read() is None
    file.path.write_bytes(content)
    assert SignedFile(file.path, b"t" * 32, "key").read() is None, "of another user"
    assert SignedFile(file.path, b"s" * 32, "another").read() is None, "of another plan"
    assert file.read() == KERNELS
    file.path.unlink()
    assert file.read() is None


def test_a_write_that_fails_changes_nothing(file: SignedFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        file.write(b"others")
    assert file.read() == KERNELS
    assert [path.name for path in tmp_path.iterdir()] == ["unet.kernels"]
