"""Writing bundles so that a reader sees the old one whole or the new one whole, whatever happens.

A bundle is made in a hidden folder beside its target, synced, and renamed. An existing bundle is exchanged in one
system call where the system has one (Linux `renameat2`), so that even kill -9 finds one of the two in place. Elsewhere
the old one is set aside for a moment; the next export to the same place puts it back where it is needed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ipa.engines.errors import BundleError, IpaError
from ipa.engines.locks import locked, remove_unless_locked
from ipa.engines.manifest import FILE_NAME, Manifest
from ipa.trainer.files import atomic_path, sync_file, sync_folder

_ASIDE = "old"  # where a bundle waits while another takes its place, in a hidden folder
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def staged_bundle(target: Path, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and vanishes when it does not.

    Args:
        target: where the bundle will be.
        force: replace a bundle that is there.
    Raises:
        BundleError: something is there already, or the disk is full or failed.
    """
    target = target.resolve()
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with locked(target.parent):  # so that nobody takes the new folder, not locked yet, for an abandoned one
                _restore(target)
                check_target(target, force)
                for abandoned in target.parent.glob(f"{_prefix(target)}*"):
                    remove_unless_locked(abandoned)
                staging = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
                stack.callback(shutil.rmtree, staging, ignore_errors=True)
                stack.enter_context(locked(staging))
            yield staging
            sync_tree(staging)
            staging.chmod(0o777 & ~_umask())
            _put_in_place(staging, target, force)
        except OSError as error:
            raise _failed(target, error) from error


def check_target(target: Path, force: bool) -> None:
    """Refuse a target that holds anything, except a bundle that may be replaced.

    Raises:
        BundleError: says what is there.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / FILE_NAME).is_file():
        raise BundleError(f"{target} exists and is not a bundle; choose another --output")
    if not force:
        raise BundleError(f"{target} is a bundle already; replace it with --force, or choose another --output")


@contextmanager
def locked_bundle(root: Path) -> Iterator[None]:
    """Keep other processes from changing the same bundle meanwhile."""
    try:
        with locked(root):
            yield
    except OSError as error:
        raise _failed(root, error) from error


def update_manifest(root: Path, change: Callable[[Manifest], Manifest]) -> Manifest:
    """Replace the manifest of a bundle (that `locked_bundle` holds) by a changed one; returns the new one."""
    path = root / FILE_NAME
    manifest = change(Manifest.from_json(path.read_text("utf-8")))
    write_whole(path, manifest.to_json())
    return manifest


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it has its old content or the new one, never a part."""
    with atomic_path(path) as partial:
        partial.write_text(text, "utf-8")


def sync_tree(folder: Path) -> None:
    """Bring every file and folder of a tree to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync_file(path)


def _put_in_place(staging: Path, target: Path, force: bool) -> None:
    """Rename `staging` to `target`; what was there ends up at `staging`."""
    check_target(target, force)
    if not target.exists() or not any(target.iterdir()):
        staging.rename(target)  # fails on a folder that has been filled since
    elif not _exchange(staging, target):
        with locked(target.parent):  # from those who restore or remove what is set aside
            aside = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent)) / _ASIDE
            target.rename(aside)
            try:
                staging.rename(target)
            except BaseException:
                aside.rename(target)
                aside.parent.rmdir()
                raise
            shutil.rmtree(aside.parent)
    sync_folder(target.parent)


def _restore(target: Path) -> None:
    """Put back the bundle that a killed process set aside, if it did not come to put the new one in place."""
    for aside in target.parent.glob(f"{_prefix(target)}*/{_ASIDE}"):
        if not target.exists() and (aside / FILE_NAME).is_file():
            aside.rename(target)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step; false where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return renameat2 is not None and not renameat2(
        _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE
    )


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _failed(target: Path, error: OSError) -> IpaError:
    if error.errno == errno.ENOSPC:
        free = shutil.disk_usage(_existing(target)).free / 2**20
        return BundleError(
            f"{target} could not be written: the disk is full ({free:.0f} MiB left); a Stable Diffusion 1.5 bundle "
            "takes 7 GiB in fp32 and 3.5 GiB in fp16. Make room, or choose another place"
        )
    reason = error.strerror or str(error)
    return BundleError(f"{target} could not be written: {reason} ({error.filename or target})")


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())
