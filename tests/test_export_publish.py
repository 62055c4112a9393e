"""Old bundle whole or new bundle whole, whatever happens to the process that writes."""

from __future__ import annotations

import errno
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ipa.engines.errors import BundleError
from ipa.engines.manifest import FILE_NAME
from ipa.export import publish
from ipa.export.publish import staged_bundle, write_whole

WRITER = """
import sys
from pathlib import Path
from ipa.export.publish import staged_bundle
target, number = Path(sys.argv[1]), 0
while True:
    number += 1
    with staged_bundle(target, force=True) as root:
        for part in ("unet", "vae"):
            (root / part).mkdir()
            (root / part / "model.onnx").write_text(f"{sys.argv[2]} {number} " * 2000)
        (root / "manifest.json").write_text(f"{sys.argv[2]} {number} " * 2000)
"""


def _fill(root: Path, text: str) -> None:
    (root / FILE_NAME).write_text(text)


def _contents(target: Path) -> set[str]:
    return {path.read_text() for path in target.rglob("*") if path.is_file()}


@pytest.mark.parametrize("exchanges", [True, False])
def test_force_replaces_the_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool) -> None:
    if not exchanges:
        monkeypatch.setattr(publish, "_exchange", lambda first, second: False)
    target = tmp_path / "bundle"
    for text in ("old", "new"):
        with staged_bundle(target, force=True) as root:
            _fill(root, text)
            (root / text).touch()
    assert sorted(path.name for path in target.iterdir()) == [FILE_NAME, "new"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_killed_writers_leave_a_whole_bundle(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    dice = random.Random(0)
    for number in range(6):
        writers = [subprocess.Popen([sys.executable, "-c", WRITER, target, f"{number}-{name}"]) for name in "ab"]
        while not (target.exists() and (target / FILE_NAME).read_text().startswith(f"{number}-")):
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.05))
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        assert len(_contents(target)) == 1, "files of two exports are mixed, or a file is cut"
        assert len(list(target.rglob("*"))) == 5
    with staged_bundle(target, force=True) as root:
        _fill(root, "last")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"], "what killed exports left behind is removed"


def test_without_exchange_a_failed_rename_keeps_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = tmp_path / "bundle", Path.rename
    target.mkdir()
    _fill(target, "old")

    def fail(path: Path, to: Path) -> Path:
        if to == target and (path / FILE_NAME).read_text() == "new":
            raise OSError(errno.EIO, "I/O error")
        return rename(path, to)

    monkeypatch.setattr(publish, "_exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(BundleError, match="I/O error"), staged_bundle(target, force=True) as root:
        _fill(root, "new")
    assert _contents(target) == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_a_killed_writer_set_aside_is_put_back(tmp_path: Path) -> None:
    target, aside = tmp_path / "bundle", tmp_path / ".bundle.partial-x" / "old"
    aside.mkdir(parents=True)
    _fill(aside, "old")
    with pytest.raises(BundleError, match="--force"), staged_bundle(target, force=False):
        pass
    assert _contents(target) == {"old"}
    aside.mkdir()
    _fill(aside, "older")  # killed after the new one was in place
    with staged_bundle(target, force=True) as root:
        _fill(root, "new")
    assert _contents(target) == {"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_failure_leaves_the_old_bundle(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with staged_bundle(target, force=False) as root:
        _fill(root, "old")
    with pytest.raises(KeyboardInterrupt), staged_bundle(target, force=True) as root:
        _fill(root, "half")
        raise KeyboardInterrupt
    assert _contents(target) == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_full_disk_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"disk is full .* takes 7 GiB"), staged_bundle(tmp_path / "b", False):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_does_not_replace_without_force(tmp_path: Path) -> None:
    _fill(tmp_path, "old")
    with pytest.raises(BundleError, match="--force"), staged_bundle(tmp_path, False):
        pass


def test_never_replaces_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(BundleError, match="not a bundle"), staged_bundle(tmp_path, True):
        pass
    assert (tmp_path / "thesis.tex").exists()


def test_bundle_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with pytest.raises(BundleError, match="--force"), staged_bundle(target, False) as root:
        _fill(root, "slow")
        target.mkdir()
        _fill(target, "fast")
    assert _contents(target) == {"fast"}


def test_write_whole_keeps_the_old_text_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / FILE_NAME
    write_whole(path, "old")

    def fail(handle: int) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="I/O error"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]
