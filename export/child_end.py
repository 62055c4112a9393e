"""How a child process ended, for people."""

from __future__ import annotations

import os
import resource
import signal
import subprocess


def wait_for(child: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Wait until a child ends; its exit code, and what to say of an end that is no success, peak memory included."""
    try:
        _, status, usage = os.wait4(child.pid, 0)  # unlike the child itself, it tells of one that was killed, too
    except ChildProcessError:  # another thread that stopped it was told already
        return child.wait(), _ending(child.wait())
    child.returncode = os.waitstatus_to_exitcode(status)
    # Linux counts what the parent had when it started the child as the child's.
    is_known = usage.ru_maxrss > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = f"peak memory {'' if is_known else 'at most '}{usage.ru_maxrss / 2**20:.1f} GiB"
    return child.returncode, f"{_ending(child.returncode)} ({peak})"


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed while it built, most likely for want of memory"
    if code < 0:
        return f"crashed while it built ({signal.strsignal(-code)})"
    return "could not build it"
