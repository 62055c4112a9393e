"""Engine plans on disk. A plan is native code, so it is read only with a proof that this user's cache wrote it.

A file is: magic, length of the header, HMAC, header (JSON: the key, the tensors, size and sha256 of the plan), plan.
The HMAC covers the header, the header the plan; nothing of the plan is looked at before both fit.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = b"IPAPLAN1"
RECIPE = "2"  # of the graph that is handed to the builder, and how: another number builds every engine again
_LENGTHS = struct.Struct("<I32s")  # of the header in bytes, and the HMAC
_MAX_HEADER = 2**20
_BLOCK = 2**24


class PlanError(Exception):
    """A plan file is not one that may be used; the message is the reason, for a line of a report."""


@dataclass(frozen=True)
class PlanKey:
    """All that a plan depends on. Another value anywhere means another plan.

    Attributes:
        component: of the spec table, `ip_adapter/NAME` or `controlnet/NAME`.
        weights: sha256 over the graph and its data.
        precision: dtype of the graph.
        engine: back-end that built it.
        version: of that back-end's library.
        target: compute capabilities it is for, such as `8.6,8.9`, or the one GPU it was built on.
        profile: smallest, usual and largest shape of every input, as text.
        platform: operating system and processor.
        recipe: number of our own way to build; another one builds again.
    """

    component: str
    weights: str
    precision: str
    engine: str
    version: str
    target: str
    profile: str
    platform: str
    recipe: str

    @property
    def digest(self) -> str:
        """sha256 of all fields, in hexadecimal."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def differences(self, wanted: PlanKey) -> list[str]:
        """What `wanted` has that this key has not, for people."""
        pairs = ((field.name, getattr(self, field.name), getattr(wanted, field.name)) for field in fields(self))
        return [f"{name} was {_short(old)}, is {_short(new)}" for name, old, new in pairs if old != new]


def _short(value: str) -> str:
    return f"{value[:12]}..." if len(value) == 64 and " " not in value else value


@dataclass(frozen=True)
class PlanHeader:
    """What a plan file says of its plan.

    Attributes:
        key: what it was built of and for.
        bundle: folder of the bundle it was built from, as a hint for messages.
        tensors: inputs and outputs by name, as `ipa.engines.spec.TensorSpec` prints them.
        seconds, peak_mib: what building it took.
        size, sha256: of the plan.
    """

    key: PlanKey
    bundle: str
    tensors: Mapping[str, str]
    seconds: float
    peak_mib: float
    size: int
    sha256: str

    def to_json(self) -> bytes:
        """The header as it is written."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> PlanHeader:
        """Raises `PlanError` when it is not a header."""
        try:
            record: dict[str, Any] = json.loads(data)
            header = cls(**{**record, "key": PlanKey(**record["key"]), "size": int(record["size"])})
        except (ValueError, TypeError, KeyError) as error:
            raise PlanError("its header cannot be read") from error
        return header


def write_plan(path: Path, header: PlanHeader, plan: Path, secret: bytes) -> None:
    """Write a plan file; the caller sees to it that nobody reads a half-written one.

    Args:
        path: to write.
        header: with size and sha256 of the plan.
        plan: file with the serialised engine.
        secret: of the cache.
    """
    text = header.to_json()
    with path.open("wb") as target, plan.open("rb") as source:
        target.write(MAGIC + _LENGTHS.pack(len(text), _mac(text, secret)) + text)
        while block := source.read(_BLOCK):
            target.write(block)


def read_header(path: Path, secret: bytes | None) -> PlanHeader:
    """The header alone.

    Args:
        path: of the plan file.
        secret: of the cache that wrote it; `None` reads what somebody else wrote, on the user's word.
    Raises:
        PlanError: not a plan file, cut off, or written by somebody else.
    """
    with path.open("rb") as file:
        return _read_header(file, path.stat().st_size, secret)


def check_plan(path: Path, secret: bytes | None) -> PlanHeader:
    """The header, after a look at all of the plan; arguments and errors as `read_plan`, in little memory."""
    with path.open("rb") as file:
        header = _read_header(file, path.stat().st_size, secret)
        found = hashlib.sha256()
        while block := file.read(_BLOCK):
            found.update(block)
    _check_sha256(found.hexdigest(), header)
    return header


def read_plan(path: Path, secret: bytes | None) -> tuple[PlanHeader, bytes]:
    """Header and plan; arguments and errors as `read_header`, and the plan is the one that was written."""
    with path.open("rb") as file:
        header = _read_header(file, path.stat().st_size, secret)
        plan = file.read()
    _check_sha256(hashlib.sha256(plan).hexdigest(), header)
    return header, plan


def _check_sha256(found: str, header: PlanHeader) -> None:
    if found != header.sha256:
        raise PlanError("the plan in it is damaged (sha256)")


def _read_header(file: BinaryIO, file_size: int, secret: bytes | None) -> PlanHeader:
    start = file.read(len(MAGIC) + _LENGTHS.size)
    if len(start) < len(MAGIC) + _LENGTHS.size or not start.startswith(MAGIC):
        raise PlanError("it is not a plan file of this version of ipa-runtime")
    length, mac = _LENGTHS.unpack(start[len(MAGIC) :])
    if length > min(_MAX_HEADER, file_size):
        raise PlanError("its header is damaged")
    text = file.read(length)
    if secret is not None and not hmac.compare_digest(mac, _mac(text, secret)):
        raise PlanError("it was not written by this cache, or was changed (HMAC)")
    header = PlanHeader.from_json(text)
    if file_size != len(start) + length + header.size:
        raise PlanError(f"it has {file_size} bytes, {len(start) + length + header.size} were written")
    return header


def _mac(text: bytes, secret: bytes) -> bytes:
    return hmac.digest(secret, MAGIC + text, "sha256")
