"""Whole speed runs of contenders whose speed is known, in processes of their own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from ipa.benchmarks import processes
from ipa.benchmarks.origin import origin
from ipa.benchmarks.processes import ContenderError, ContenderProcess, Entry
from ipa.benchmarks.records import Interval, SpeedRecord, read_record, write_record
from ipa.benchmarks.speed_run import Outcome, SpeedRun, Work
from ipa.engines.errors import IpaError

WORK = Work(block_steps=2, calls=10, images=1, floor=lambda dtype: 0.005 if dtype == "float32" else None)


@pytest.fixture(autouse=True)
def fakes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")


def sleeper(name: str, seconds: float, fails: str = "") -> Entry:
    return Entry(name, f"{name} in words", "bench_fakes:Sleeper", {"seconds": seconds, "fails": fails})


def run(*entries: Entry, pairs: int = 3) -> Outcome:
    return SpeedRun(entries, WORK, pairs, lambda: None, lambda text, done: None).run()


def test_a_slowed_engine_is_reported_slower_by_its_factor() -> None:
    outcome = run(sleeper("first", 0.04), sleeper("slow", 0.08), sleeper("fast", 0.02))
    first, slow, fast = outcome.contenders
    # A sleep ends up to a millisecond late, on a busy machine later.
    assert slow.ratio is not None and slow.ratio.value == pytest.approx(0.5, rel=0.15)
    assert fast.ratio is not None and fast.ratio.value == pytest.approx(2.0, rel=0.15)
    assert first.ratio is None
    assert outcome.null is not None and outcome.null.value == pytest.approx(1.0, rel=0.15)
    assert first.step_seconds.value == pytest.approx(0.02, rel=0.25)
    assert first.stage_seconds == {"text": pytest.approx(0.02, rel=0.5)}
    assert first.seconds_per_image == pytest.approx(10 * first.step_seconds.value + first.stage_seconds["text"])
    assert first.images_per_second == pytest.approx(1 / first.seconds_per_image)
    assert first.times_floor == pytest.approx(first.step_seconds.value / 0.005)
    assert first.peak_host_mib > 10 and first.load_seconds > 0.01 and first.first_call_seconds >= 0.06


def test_a_busy_process_does_not_turn_a_null_into_a_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, so that it fails always or never: how often intervals cover is counted in test_bench_pairing.

    The neighbour makes half of the blocks up to twice as slow and leaves while the second is measured.
    """
    monkeypatch.setattr(processes, "PAUSE", 0)
    options = {"clock": str(tmp_path / "clock"), "seed": 0, "leaves": 75}
    entries = [
        Entry(name, "", "bench_fakes:Neighboured", {"seconds": seconds, **options})
        for name, seconds in (("first", 0.3), ("same", 0.3), ("fast", 0.2))
    ]
    outcome = run(*entries, pairs=9)
    first, same, fast = outcome.contenders
    assert same.step_seconds.high > 1.2 * same.step_seconds.value  # the neighbour was there, and left
    assert first.step_seconds.count == 3 * 18  # of all rounds, the null's too
    assert outcome.null is not None and outcome.null.covers(1.0)
    assert same.ratio is not None and same.ratio.covers(1.0)
    assert fast.ratio is not None and fast.ratio.value == pytest.approx(1.5, rel=0.02)


def test_what_fails_is_listed_and_the_others_are_measured() -> None:
    outcome = run(sleeper("broken", 0.01, "open"), sleeper("first", 0.01), sleeper("poor", 0.01, "run"))
    assert [one.name for one in outcome.contenders] == ["first"]
    assert {one.name: one.reason for one in outcome.not_measured} == {
        "broken": "ValueError: there is no such model",
        "poor": "MemoryError: out of memory",
    }


def test_ctrl_c_keeps_what_was_measured() -> None:
    def interrupt(text: str | None, done: int) -> None:
        if text == "second: warm-up":
            raise KeyboardInterrupt

    entries = [sleeper("first", 0.01), sleeper("second", 0.01), sleeper("third", 0.01)]
    outcome = SpeedRun(entries, WORK, 2, lambda: None, interrupt).run()
    assert [one.name for one in outcome.contenders] == ["first"]
    assert outcome.is_interrupted
    assert [(one.name, one.reason) for one in outcome.not_measured] == [
        ("second", "the run was interrupted"),
        ("third", "the run was interrupted"),
    ]


def killed_at(text: str, entries: list[Entry], pids: Path, which: int) -> Outcome:
    """Run, and kill one of the processes, counted as they were started, when the run says `text`."""

    def kill(said: str | None, done: int) -> None:
        if said == text:
            os.kill(int(pids.read_text().split()[which]), signal.SIGKILL)

    return SpeedRun(entries, WORK, 2, lambda: None, kill).run()


def known(name: str, pids: Path) -> Entry:
    return Entry(name, "", "bench_fakes:Known", {"seconds": 0.001, "pids": str(pids)})


def test_a_baseline_that_is_killed_ends_the_comparison(tmp_path: Path) -> None:
    """As the system does when memory runs out, between two blocks."""
    entries = [known(name, tmp_path / "pids") for name in ("first", "second", "third", "fourth")]
    outcome = killed_at("third", entries, tmp_path / "pids", 0)
    assert [one.name for one in outcome.contenders] == ["first", "second"]
    assert [one.name for one in outcome.not_measured] == ["third", "fourth"]
    for one in outcome.not_measured:
        assert "the baseline failed" in one.reason and "the process of first ended with code -9" in one.reason
    assert not outcome.is_interrupted


def test_a_baseline_that_is_killed_early_is_followed_by_the_next(tmp_path: Path) -> None:
    entries = [known(name, tmp_path / "pids") for name in ("first", "second", "third")]
    outcome = killed_at("first against itself", entries, tmp_path / "pids", 0)
    assert [one.name for one in outcome.contenders] == ["second", "third"]
    assert [one.name for one in outcome.not_measured] == ["first"]


def test_another_that_is_killed_leaves_the_rest(tmp_path: Path) -> None:
    entries = [known(name, tmp_path / "pids") for name in ("first", "second", "third")]
    outcome = killed_at("second: stages", entries, tmp_path / "pids", 2)  # the null's is number 1
    assert [one.name for one in outcome.contenders] == ["first", "third"]
    (missing,) = outcome.not_measured
    assert missing.name == "second" and missing.reason.startswith("the process of second ended with code -9")


def test_what_a_library_prints_is_no_answer() -> None:
    with ContenderProcess(Entry("talker", "", "bench_fakes:Talker", {"seconds": 0.0})) as talker:
        assert talker.block() < 1


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(ContenderError, match="the process of dead ended with code 1: killed, say"):
        ContenderProcess(Entry("dead", "", "bench_fakes:dies"))


def test_memory_on_the_device_is_that_of_the_contender() -> None:
    # Of each: before, then the largest of three: of the first after its stages, of the second after its rounds.
    used = iter([100.0, 350.0, 380.0, 360.0, 360.0, 400.0, 420.0, 410.0])
    entries = [sleeper("first", 0.0), sleeper("second", 0.0)]
    outcome = SpeedRun(entries, WORK, 2, lambda: next(used), lambda text, done: None).run()
    assert [one.peak_device_mib for one in outcome.contenders] == [280.0, 60.0]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    outcome = run(sleeper("first", 0.0), pairs=2)
    record = SpeedRecord(origin(), {"model": "x"}, {}, {}, "first", outcome.null, outcome.contenders)
    write_record(record, tmp_path / "deep" / "speed.json")
    assert read_record(tmp_path / "deep" / "speed.json") == record
    assert isinstance(record.null, Interval)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as a record"),
        ('{"kind": "speed", "format_version": 99}', "is of format 99, this is 1; run `ipa-bench speed` again"),
        ('{"kind": "speed", "format_version": 1}', "'origin': Field required; run `ipa-bench speed` again"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(IpaError) as refusal:
        read_record(tmp_path / "record.json")
    assert message in str(refusal.value)


def test_other_json_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"command": "x"}')
    assert read_record(tmp_path / "other.json") is None
