"""A speed run: every contender against the baseline in rounds A B B A, each in a process of its own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ipa.benchmarks.intervals import Interval, bootstrap
from ipa.benchmarks.pairing import Quad, first_seconds, measure, ratio, second_seconds
from ipa.benchmarks.processes import ContenderError, ContenderProcess, Entry
from ipa.benchmarks.progress import Progress
from ipa.benchmarks.records import NotMeasured, Speed

STAGE_RUNS = 3
DeviceMemory = Callable[[], float | None]  # MiB in use on the GPU; `None` without one


@dataclass(frozen=True)
class Work:
    """What turns seconds of a block into the figures of a record.

    Attributes:
        block_steps: calls of the UNet in a block; `calls` of the whole run; `images` a run.
        floor: seconds of a step at the machine's own rates, by dtype.
    """

    block_steps: int
    calls: int
    images: int
    floor: Callable[[str], float | None]


@dataclass
class Outcome:
    """What a run found; the baseline comes first."""

    contenders: list[Speed] = field(default_factory=list)
    null: Interval | None = None
    not_measured: list[NotMeasured] = field(default_factory=list)


class SpeedRun:
    """Times contenders against the first of them."""

    def __init__(
        self, entries: Sequence[Entry], work: Work, pairs: int, device_memory: DeviceMemory, progress: Progress
    ) -> None:
        self._entries, self._work, self._pairs = entries, work, pairs
        self._device_memory, self._progress = device_memory, progress

    def run(self) -> Outcome:
        """Measure one after the other; what fails, or comes after Ctrl-C, is listed with its reason."""
        outcome = Outcome()
        waiting = list(self._entries)
        while waiting and not outcome.contenders:  # the first that works is the baseline
            entry = waiting.pop(0)
            try:
                self._against(entry, waiting, outcome)
            except ContenderError as error:
                outcome.not_measured.append(NotMeasured(entry.name, str(error)))
        return outcome

    def _against(self, baseline: Entry, others: list[Entry], outcome: Outcome) -> None:
        used = self._device_memory()
        self._progress(f"{baseline.name}: warm-up", 0)
        with ContenderProcess(baseline) as first:
            first.warm()
            device = _difference(self._device_memory(), used)
            stages, itself = self._stages(first), f"{baseline.name} against itself"
            try:
                with ContenderProcess(baseline) as again:
                    again.warm()
                    quads = self._rounds(first, again, itself)
                outcome.null, block = ratio(quads), first_seconds(quads)
            except ContenderError as error:  # no room for two of them, say
                outcome.not_measured.append(NotMeasured(itself, str(error)))
                block = bootstrap([first.block() for _ in range(2 * self._pairs)])
            outcome.contenders.append(self._speed(baseline, first, block, None, stages, device))
            while others:
                entry = others.pop(0)
                try:
                    outcome.contenders.append(self._other(first, entry))
                except ContenderError as error:
                    outcome.not_measured.append(NotMeasured(entry.name, str(error)))
                except KeyboardInterrupt:
                    left = [entry, *others]
                    outcome.not_measured += [NotMeasured(one.name, "the run was interrupted") for one in left]
                    others.clear()

    def _other(self, first: ContenderProcess, entry: Entry) -> Speed:
        used = self._device_memory()
        self._progress(f"{entry.name}: warm-up", 0)
        with ContenderProcess(entry) as second:
            second.warm()
            device = _difference(self._device_memory(), used)
            quads = self._rounds(first, second, entry.name)
            return self._speed(entry, second, second_seconds(quads), ratio(quads), self._stages(second), device)

    def _rounds(self, first: ContenderProcess, second: ContenderProcess, name: str) -> list[Quad]:
        self._progress(name, 0)
        first.block()  # it has been idle
        return measure(first.block, second.block, self._pairs, lambda: self._progress(None, 1))

    def _stages(self, contender: ContenderProcess) -> dict[str, float]:
        self._progress(f"{contender.name}: stages", 0)
        return {
            name: statistics.median(contender.stage(name) for _ in range(STAGE_RUNS)) for name in contender.stage_names
        }

    def _speed(
        self,
        entry: Entry,
        process: ContenderProcess,
        block: Interval,
        against: Interval | None,
        stages: dict[str, float],
        device_mib: float | None,
    ) -> Speed:
        work = self._work
        steps = work.block_steps
        step = Interval(block.value / steps, block.low / steps, block.high / steps, block.count)
        whole = work.calls * step.value + sum(stages.values())
        floor = work.floor(process.dtype)
        events = bootstrap(process.device_seconds).value / work.block_steps if process.device_seconds else None
        return Speed(
            name=entry.name,
            title=entry.title,
            dtype=process.dtype,
            step_seconds=step,
            device_step_seconds=events,
            ratio=against,
            stage_seconds=stages,
            seconds_per_image=whole / work.images,
            images_per_second=work.images / whole,
            first_call_seconds=process.first_call_seconds,
            load_seconds=process.load_seconds,
            build_seconds=entry.build_seconds,
            peak_host_mib=process.peak_mib,
            peak_device_mib=device_mib,
            floor_seconds=floor,
            times_floor=None if floor is None else step.value / floor,
            warm_up_blocks=len(process.warm_up.seconds),
            is_settled=process.warm_up.is_settled,
        )


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before
