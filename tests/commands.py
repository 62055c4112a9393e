"""`ipa-run` called in this process, for tests."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from ipa.runtime.cli import main

Run = Callable[..., tuple[int, str, str]]


def call_ipa_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["ipa-run", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(result: tuple[int, str, str]) -> str:
    """The one message of a command that stopped with exit code 2."""
    code, out, err = result
    assert code == 2, (out, err)
    assert out == ""
    assert err.startswith("ipa-run: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err
