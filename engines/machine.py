"""What this machine has for us: processor cores, memory, packages, and a place for what is built."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def available_cores() -> int:
    """Cores this process may use; inference engines by themselves count the machine's, ignoring affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int | None:
    """Bytes that can be had without swapping, the control group's limit included; `None` where nobody says."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        found += [int(line.split()[1]) * 2**10 for line in lines if line.startswith("MemAvailable:")]
        limit = Path("/sys/fs/cgroup/memory.max").read_text("ascii").strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text("ascii"))
            stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text("ascii").splitlines())
            found.append(int(limit) - used + int(stat.get("inactive_file", 0)))  # file cache can be given back
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def platform_name() -> str:
    """Operating system and processor, such as `linux-x86_64`."""
    return f"{platform.system()}-{platform.machine()}".lower()


def default_cache() -> Path:
    """`$IPA_CACHE`, else `ipa` in the XDG cache folder."""
    if given := os.environ.get("IPA_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ipa"


def has_distribution(name: str) -> bool:
    """Whether a Python distribution is installed."""
    return distribution_version(name) is not None


def distribution_version(name: str) -> str | None:
    """Version of a Python distribution, `None` where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # brings `email` and `socket`

    try:
        return version(name)
    except PackageNotFoundError:
        return None
