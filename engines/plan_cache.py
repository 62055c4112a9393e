"""The user's cache of engine plans: one file a plan, named by its key, readable by nobody else."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ipa.engines.checked_file import CheckedFile
from ipa.engines.errors import EngineError
from ipa.engines.locks import locked, remove_unless_locked
from ipa.engines.plan_file import PlanError, PlanHeader, PlanKey, check_plan, read_header, read_plan, write_plan
from ipa.engines.signed_file import SignedFile

_SECRET_FILE, _SECRET_BYTES = "key", 32
SUFFIX = ".plan"
_WORKSPACE = ".build-"


@dataclass(frozen=True)
class Missing:
    """No plan for a key, and why."""

    reason: str


class PlanCache:
    """Plans below one folder that belongs to this user alone (mode 0700), with a secret that signs them (0600)."""

    def __init__(self, root: Path) -> None:
        """Open the cache, made when missing.

        Raises:
            EngineError: the folder or its secret belongs to others or is open to them, or cannot be made.
        """
        self.root = root
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(root, 0o700)
            self._secret = _secret(root / _SECRET_FILE)
        except OSError as error:
            raise EngineError(
                f"the engine cache {root} cannot be used: {error.strerror or error}; name another folder by IPA_CACHE"
            ) from error

    def path(self, key: PlanKey) -> Path:
        """Where the plan of a key lies or will lie."""
        return self.root / f"{_file_part(key.component)}-{key.engine}-{key.digest[:32]}{SUFFIX}"

    def find(self, key: PlanKey, bundle: Path) -> PlanHeader | Missing:
        """The header of a key's plan, all of which has been checked; or why there is none.

        A plan that nobody has written to since it was stored, or checked last, is not read again.

        Args:
            key: of the plan that is wanted.
            bundle: whose older plans explain what has changed.
        """
        path = self.path(key)
        if not path.exists():
            return Missing(self._why_missing(key, bundle))
        checked = CheckedFile(path, self._secret)
        try:
            if checked.is_unchanged():
                header = read_header(path, self._secret)
            else:
                status = path.stat()
                header = check_plan(path, self._secret)
                checked.remember(status)
        except (PlanError, OSError) as error:
            return Missing(f"{path.name} is refused: {error}")
        return header if header.key == key else Missing(f"{path.name} holds another plan")

    def load(self, key: PlanKey) -> tuple[PlanHeader, bytes]:
        """A plan, proven to be what this cache wrote for the key.

        Raises:
            PlanError: there is none, or it is not; says why.
        """
        path = self.path(key)
        if not path.exists():
            raise PlanError("there is none in the cache")
        header, plan = read_plan(path, self._secret)
        if header.key != key:
            raise PlanError("; ".join(header.key.differences(key)))
        return header, plan

    def store(
        self, key: PlanKey, plan: Path, bundle: Path, tensors: Mapping[str, str], seconds: float, peak_mib: float
    ) -> PlanHeader:
        """Put a plan into the cache, whole or not at all.

        Args:
            key: what it was built of and for.
            plan: file with the serialised engine, in a `workspace` of this cache.
            bundle, tensors, seconds, peak_mib: see `PlanHeader`.
        Raises:
            EngineError: the disk is full or failed.
        """
        try:
            with plan.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            folder, size = os.fspath(bundle.resolve()), plan.stat().st_size
            header = PlanHeader(key, folder, tensors, seconds, peak_mib, size, sha256)
            handle, name = tempfile.mkstemp(dir=plan.parent)  # mode 0600, and gone with the workspace
            os.close(handle)
            write_plan(Path(name), header, plan, self._secret)
            _sync(Path(name))
            path = self.path(key)
            Path(name).replace(path)
            _sync(self.root)
            CheckedFile(path, self._secret).remember(path.stat())
        except OSError as error:
            raise self._failed(error) from error
        return header

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A folder on the cache's disk; it is gone afterwards, or at the next build if this one is killed.

        Raises:
            EngineError: it cannot be made.
        """
        try:
            with locked(self.root):  # so that nobody takes the new folder, not locked yet, for an abandoned one
                for folder in self.root.glob(f"{_WORKSPACE}*"):
                    remove_unless_locked(folder)
                folder = Path(tempfile.mkdtemp(prefix=_WORKSPACE, dir=self.root))
                handle = os.open(folder, os.O_RDONLY)
                fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise self._failed(error) from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)

    def kernels(self, key: PlanKey) -> SignedFile:
        """What is compiled when the plan of a key first runs."""
        return SignedFile(self.path(key).with_suffix(".kernels"), self._secret, f"kernels of {key.digest}")

    def timings(self, engine: str, version: str, target: str) -> SignedFile:
        """What a builder measured on a GPU, for the next build by the same library there."""
        purpose = f"timings of {engine} {version} on {target}"
        name = f"{engine}-{hashlib.sha256(purpose.encode()).hexdigest()[:32]}.timings"
        return SignedFile(self.root / name, self._secret, purpose)

    def headers(self) -> Iterator[tuple[Path, PlanHeader]]:
        """Every plan that this cache wrote and nobody changed since."""
        for path in sorted(self.root.glob(f"*{SUFFIX}")):
            try:
                yield path, read_header(path, self._secret)
            except (PlanError, OSError):
                continue

    def _failed(self, error: OSError) -> EngineError:
        free = shutil.disk_usage(self.root).free / 2**30
        return EngineError(
            f"the engine cache {self.root} cannot be written: {error.strerror or error}; {free:.1f} GiB of disk are "
            "free: make room, or name another folder by IPA_CACHE"
        )

    def _why_missing(self, key: PlanKey, bundle: Path) -> str:
        """The difference to the nearest plan of the same component and bundle."""
        folder = os.fspath(bundle.resolve())
        older = [
            header.key.differences(key)
            for _, header in self.headers()
            if (header.bundle, header.key.component, header.key.engine) == (folder, key.component, key.engine)
        ]
        nearest: list[str] = min(older, key=len, default=[])
        return "; ".join(nearest) or "not built yet"


def _file_part(component: str) -> str:
    """A component's name as a part of a file name."""
    return component.replace("/", "-")


def _secret(path: Path) -> bytes:
    """The cache's secret; made by whoever comes first."""
    if not path.exists():
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".partial")
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(_SECRET_BYTES))
        try:
            os.link(name, path)  # fails where another process was faster, and its secret stays
        except FileExistsError:
            pass
        finally:
            Path(name).unlink()
    _check_private(path, 0o600)
    secret = path.read_bytes()
    if len(secret) != _SECRET_BYTES:
        raise EngineError(f"{path} is damaged; delete it, the plans beside it are then built again")
    return secret


def _check_private(path: Path, mode: int) -> None:
    """Refuse what another user owns or could change."""
    status = path.stat()
    if status.st_uid != os.getuid():
        raise EngineError(f"{path} belongs to another user; name another folder by IPA_CACHE")
    if stat.S_IMODE(status.st_mode) & ~mode & 0o777:
        raise EngineError(
            f"{path} has mode {stat.S_IMODE(status.st_mode):04o}, others could put plans there: `chmod {mode:o} {path}`"
        )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
