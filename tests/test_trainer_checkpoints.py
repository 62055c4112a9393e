"""Checkpoints under kill -9, disk errors, damage and leftovers."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ipa.trainer import checkpoints
from ipa.trainer.checkpoints import COMPLETE, newest_checkpoint, save_checkpoint, set_aside
from ipa.trainer.errors import TrainError

# Saves checkpoints without end, each a little different, and says which step is surely on the disk.
SAVER = """
import sys
from pathlib import Path
from ipa.trainer.checkpoints import save_checkpoint
for step in range(1, 100000):
    def write(folder):
        (folder / "weights").write_bytes(step.to_bytes(4, "big") * 50_000)
        (folder / "state").write_text(str(step))
    save_checkpoint(Path(sys.argv[1]), step, write, keep=2)
    print(step, flush=True)
"""


def writer(step: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "weights").write_bytes(step.to_bytes(4, "big") * 1000)
        (folder / "state").write_text(str(step))

    return write


def silent(_message: str) -> None:
    pass


def assert_whole(found: tuple[int, Path] | None) -> int:
    assert found is not None
    step, folder = found
    assert (folder / "state").read_text() == str(step)
    weights = (folder / "weights").read_bytes()
    assert weights == step.to_bytes(4, "big") * (len(weights) // 4)
    return step


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save_checkpoint(tmp_path, step, writer(step), keep=3)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (20, 30, 40)]
    assert assert_whole(newest_checkpoint(tmp_path, silent)) == 40


def test_none_where_nothing_was_saved(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "missing", silent) is None
    assert set_aside(tmp_path / "missing") is None


def test_kill_at_random_moments_leaves_the_newest_or_the_one_before(tmp_path: Path) -> None:
    moments = random.Random(0)
    for trial in range(12):
        root = tmp_path / str(trial)
        saver = subprocess.Popen([sys.executable, "-c", SAVER, str(root)], stdout=subprocess.PIPE, text=True)
        assert saver.stdout is not None
        assert saver.stdout.readline() == "1\n"
        time.sleep(moments.uniform(0, 0.05))
        saver.send_signal(signal.SIGKILL)
        reported = [int(line) for line in saver.communicate()[0].split()]
        step = assert_whole(newest_checkpoint(root, silent))
        assert step >= max(reported, default=1)
        save_checkpoint(root, step + 1, writer(step + 1), keep=2)  # what is left over is in nobody's way
        assert not list(root.glob(".step-*"))
        assert assert_whole(newest_checkpoint(root, silent)) == step + 1


class DeadDisk:
    """Lets a number of file operations pass and fails all that follow, as a process killed there would not do them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
        self.left = allowed
        for owner, name in (
            (Path, "mkdir"),
            (Path, "rename"),
            (Path, "write_bytes"),
            (Path, "write_text"),
            (checkpoints, "sync_file"),
            (checkpoints, "sync_folder"),
            (checkpoints.shutil, "rmtree"),
        ):
            monkeypatch.setattr(owner, name, self._guard(getattr(owner, name)))

    def _guard(self, operation: Callable[..., object]) -> Callable[..., object]:
        def guarded(*args: object, **kwargs: object) -> object:
            if self.left <= 0 and not kwargs.get("ignore_errors"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.left -= 1
            return operation(*args, **kwargs)

        return guarded


def test_an_error_at_any_operation_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    failures = 0
    for allowed in range(40):
        root = tmp_path / str(allowed)
        for step in (1, 2):
            save_checkpoint(root, step, writer(step), keep=2)
        with pytest.MonkeyPatch.context() as monkeypatch:
            DeadDisk(monkeypatch, allowed)
            try:
                save_checkpoint(root, 3, writer(3), keep=2)
            except TrainError as error:
                failures += 1
                assert "step 3 could not be saved" in str(error)
                assert "No space left" in str(error)
        assert assert_whole(newest_checkpoint(root, silent)) in (2, 3)
    assert 8 < failures < 40  # every operation was reached, and the last trials went through


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "no record", "bad record"])
def test_a_damaged_checkpoint_is_passed_over_with_a_message(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, writer(step), keep=2)
    folder = tmp_path / "step-00000002"
    content = bytearray((folder / "weights").read_bytes())
    if damage == "flip":
        content[1234] ^= 1
        (folder / "weights").write_bytes(content)
    elif damage == "cut":
        (folder / "weights").write_bytes(content[:-1])
    elif damage == "missing":
        (folder / "weights").unlink()
    elif damage == "no record":
        (folder / COMPLETE).unlink()
    else:
        (folder / COMPLETE).write_text("{")
    messages: list[str] = []
    assert assert_whole(newest_checkpoint(tmp_path, messages.append)) == 1
    assert len(messages) == 1 and "step-00000002" in messages[0]
    # Saving the step anew replaces the damaged one.
    save_checkpoint(tmp_path, 2, writer(2), keep=2)
    assert assert_whole(newest_checkpoint(tmp_path, silent)) == 2


def test_the_record_lists_every_file(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 7, writer(7), keep=2)
    record = json.loads((folder / COMPLETE).read_text())
    assert record["step"] == 7
    assert set(record["files"]) == {"weights", "state"}


def test_set_aside_never_overwrites(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for number in (1, 2):
        save_checkpoint(root, 5, writer(5), keep=2)
        assert set_aside(root) == tmp_path / f"checkpoints.{number}"
    assert newest_checkpoint(root, silent) is None
