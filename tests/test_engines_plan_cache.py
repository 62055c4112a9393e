"""The cache of engine plans: nothing is used that it did not write for the very same key."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from ipa.engines import plan_cache
from ipa.engines.errors import EngineError
from ipa.engines.machine import default_cache
from ipa.engines.plan_cache import Missing, PlanCache
from ipa.engines.plan_file import PlanError, PlanHeader, PlanKey, check_plan, read_plan
from ipa.engines.signed_file import SignedFile

KEY = PlanKey(
    component="unet",
    weights="a" * 64,
    precision="float16",
    engine="tensorrt-rtx",
    version="1.7.1",
    target="8.6",
    profile="sample 1x4x64x64:2x4x64x64:8x4x64x64",
    platform="linux-x86_64",
    recipe="1",
)
PLAN = random.Random(0).randbytes(3000)
BUNDLE = Path("bundle")


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path / "cache")


def store(cache: PlanCache, key: PlanKey = KEY, plan: bytes = PLAN, bundle: Path = BUNDLE) -> Path:
    with cache.workspace() as folder:
        (folder / "plan").write_bytes(plan)
        cache.store(key, folder / "plan", bundle, {"sample": "float16 1x4x64x64"}, 1.5, 200.0)
    return cache.path(key)


def test_what_was_stored_comes_back(cache: PlanCache) -> None:
    store(cache)
    header, plan = cache.load(KEY)
    assert plan == PLAN
    assert (header.key, header.size, header.seconds, header.peak_mib) == (KEY, len(PLAN), 1.5, 200.0)
    assert cache.find(KEY, BUNDLE) == header
    assert [found for _, found in cache.headers()] == [header]
    stored = cache.path(KEY)
    checked = stored.with_suffix(".checked")
    assert set(cache.root.iterdir()) == {cache.root / "key", stored, checked}, "nothing else is left"


def test_only_the_user_can_read_it(cache: PlanCache) -> None:
    modes = {path.stat().st_mode & 0o777 for path in (store(cache), cache.root / "key")}
    assert (modes, cache.root.stat().st_mode & 0o777) == ({0o600}, 0o700)


@pytest.mark.parametrize("name", ["key", "."])
def test_a_cache_that_others_can_write_is_refused(cache: PlanCache, name: str) -> None:
    path = cache.root / name
    path.chmod(0o777 if name == "." else 0o644)
    with pytest.raises(EngineError, match=r"chmod [67]00"):
        PlanCache(cache.root)


def test_a_damaged_secret_is_refused(cache: PlanCache) -> None:
    (cache.root / "key").write_bytes(b"short")
    with pytest.raises(EngineError, match="delete it"):
        PlanCache(cache.root)


def test_no_flipped_bit_is_accepted(cache: PlanCache) -> None:
    path = store(cache)
    good = path.read_bytes()
    chosen = random.Random(1)
    for _ in range(1000):
        bit = chosen.randrange(8 * len(good))
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(PlanError):
            cache.load(KEY)


def test_no_part_of_a_file_is_accepted(cache: PlanCache) -> None:
    path = store(cache)
    good = path.read_bytes()
    for length in random.Random(2).sample(range(len(good)), 300):
        path.write_bytes(good[:length])
        with pytest.raises(PlanError):
            cache.load(KEY)
        assert isinstance(cache.find(KEY, BUNDLE), Missing)
    path.write_bytes(good + b"\0")
    with pytest.raises(PlanError, match="were written"):
        cache.load(KEY)


def test_a_damaged_body_is_no_plan(cache: PlanCache) -> None:
    path = store(cache)
    bad = bytearray(path.read_bytes())
    bad[-100] ^= 1
    path.write_bytes(bad)
    assert cache.find(KEY, BUNDLE) == Missing(f"{path.name} is refused: the plan in it is damaged (sha256)")


def test_a_plan_is_read_again_only_when_somebody_wrote_to_it(cache: PlanCache, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store(cache)
    looks: list[Path] = []

    def look(looked: Path, secret: bytes) -> PlanHeader:
        looks.append(looked)
        return check_plan(looked, secret)

    monkeypatch.setattr(plan_cache, "check_plan", look)
    header = cache.find(KEY, BUNDLE)
    assert (isinstance(header, PlanHeader), looks) == (True, [])

    status = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as if nothing had happened
    assert [cache.find(KEY, BUNDLE) for _ in range(2)] == [header, header]
    assert looks == [path], "once, and the result is remembered"

    path.with_suffix(".checked").write_bytes(b"what another cache says")
    assert (cache.find(KEY, BUNDLE), looks) == (header, [path, path])


def test_a_plan_is_found_where_nothing_can_be_remembered(cache: PlanCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SignedFile, "write", full)
    store(cache)
    assert isinstance(cache.find(KEY, BUNDLE), PlanHeader)


@pytest.mark.parametrize("content", [b"", b"IPAPLAN1", b"IPAPLAN1" + b"\xff" * 36, bytes(5000)])
def test_other_files_are_refused(cache: PlanCache, content: bytes) -> None:
    cache.path(KEY).write_bytes(content)
    with pytest.raises(PlanError):
        cache.load(KEY)


def test_a_plan_of_another_cache_is_refused(cache: PlanCache, tmp_path: Path) -> None:
    foreign = store(PlanCache(tmp_path / "other"))
    cache.path(KEY).write_bytes(foreign.read_bytes())
    with pytest.raises(PlanError, match="HMAC"):
        cache.load(KEY)
    found = cache.find(KEY, BUNDLE)
    assert isinstance(found, Missing)
    assert "HMAC" in found.reason
    assert list(cache.headers()) == []
    assert read_plan(cache.path(KEY), secret=None)[1] == PLAN, "on the user's word"


def test_a_plan_under_another_key_is_refused(cache: PlanCache) -> None:
    wanted = replace(KEY, version="1.8.0")
    store(cache).rename(cache.path(wanted))
    with pytest.raises(PlanError, match=r"version was 1\.7\.1, is 1\.8\.0"):
        cache.load(wanted)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights", "b" * 64),
        ("precision", "float32"),
        ("version", "1.8.0"),
        ("target", "8.9"),
        ("profile", "sample 1x4x96x96"),
        ("platform", "linux-aarch64"),
        ("recipe", "2"),
    ],
)
def test_whatever_changes_is_the_reason(cache: PlanCache, field: str, value: str) -> None:
    store(cache)
    store(cache, replace(KEY, component="vae_decoder"))
    wanted = replace(KEY, **{field: value})
    found = cache.find(wanted, BUNDLE)
    assert isinstance(found, Missing)
    assert found.reason.startswith(f"{field} was ")
    assert found.reason.count(" was ") == 1
    elsewhere = cache.find(wanted, Path("another"))
    assert elsewhere == Missing("not built yet")


def test_the_reason_names_the_nearest_plan(cache: PlanCache) -> None:
    store(cache, replace(KEY, version="1.6", target="7.5", weights="c" * 64))
    store(cache, replace(KEY, version="1.6"))
    assert cache.find(KEY, BUNDLE) == Missing("version was 1.6, is 1.7.1")


KILLED_WHILE_STORING = """
import os, signal, sys
from pathlib import Path
from ipa.engines import plan_cache
from test_engines_plan_cache import KEY

cache = plan_cache.PlanCache(Path(sys.argv[1]))
plan_cache._sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
with cache.workspace() as folder:
    (folder / "plan").write_bytes(bytes(9))
    cache.store(KEY, folder / "plan", folder, {}, 1.0, 1.0)
"""


def test_killed_builds_leave_nothing_for_long(cache: PlanCache) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_STORING, os.fspath(cache.root)]
    result = subprocess.run(command, cwd=Path(__file__).parent)
    assert result.returncode == -signal.SIGKILL
    assert len(list(cache.root.glob(".build-*"))) == 1
    with cache.workspace() as folder, cache.workspace() as second:
        assert {path.name for path in cache.root.glob(".build-*")} == {folder.name, second.name}
    assert list(cache.root.glob(".*")) == []


def test_builds_that_start_and_end_together_do_not_meet(cache: PlanCache) -> None:
    def often(_: int) -> None:
        for _ in range(200):
            with cache.workspace() as folder:
                (folder / "plan").write_bytes(b"x")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(often, range(4)))
    assert [path.name for path in cache.root.iterdir()] == ["key"]


def test_a_full_disk_is_said(cache: PlanCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(plan_cache, "write_plan", full)
    with pytest.raises(EngineError, match=r"No space left on device; .* GiB of disk are free"):
        store(cache)
    assert [path.name for path in cache.root.iterdir()] == ["key"]


def test_processes_that_start_at_once_share_one_secret(tmp_path: Path) -> None:
    script = "import sys, pathlib\nfrom ipa.engines.plan_cache import PlanCache\nPlanCache(pathlib.Path(sys.argv[1]))"
    root = tmp_path / "cache"
    processes = [subprocess.Popen([sys.executable, "-c", script, os.fspath(root)]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert [path.name for path in root.iterdir()] == ["key"]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.delenv("IPA_CACHE", raising=False)
    assert default_cache() == Path("/xdg/ipa")
    monkeypatch.setenv("IPA_CACHE", "/mine")
    assert default_cache() == Path("/mine")


def test_the_header_says_what_it_holds() -> None:
    header = PlanHeader(KEY, "bundle", {"x": "float16 1x2"}, 1.0, 2.0, len(PLAN), hashlib.sha256(PLAN).hexdigest())
    assert PlanHeader.from_json(header.to_json()) == header
    for text in (b"[]", b"{}", b"\xff", b'{"key": 1}'):
        with pytest.raises(PlanError):
            PlanHeader.from_json(text)
