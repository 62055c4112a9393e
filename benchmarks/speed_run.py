"""A speed run: every contender against the baseline in rounds A B B A, each in a process of its own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ipa.benchmarks.intervals import Interval, bootstrap
from ipa.benchmarks.pairing import Quad, first_blocks, measure, ratio, second_seconds
from ipa.benchmarks.processes import ContenderError, ContenderProcess, Entry
from ipa.benchmarks.progress import Progress
from ipa.benchmarks.records import NotMeasured, Speed

STAGE_RUNS = 3
INTERRUPTED = "the run was interrupted"
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
    """What a run found; the baseline comes first.

    Attributes:
        is_interrupted: whether Ctrl-C ended it.
    """

    contenders: list[Speed] = field(default_factory=list)
    null: Interval | None = None
    not_measured: list[NotMeasured] = field(default_factory=list)
    is_interrupted: bool = False


class SpeedRun:
    """Times contenders against the first of them."""

    def __init__(
        self, entries: Sequence[Entry], work: Work, pairs: int, device_memory: DeviceMemory, progress: Progress
    ) -> None:
        self._entries, self._work, self._pairs = entries, work, pairs
        self._device_memory, self._progress = device_memory, progress

    def run(self) -> Outcome:
        """Measure one after the other; what fails, or comes after Ctrl-C, is listed with its reason."""
        outcome, waiting = Outcome(), list(self._entries)
        try:
            while waiting and not outcome.contenders:  # the first that works is the baseline
                try:
                    self._against(waiting, outcome)
                except ContenderError as error:
                    outcome.not_measured.append(NotMeasured(waiting.pop(0).name, str(error)))
        except KeyboardInterrupt:
            outcome.is_interrupted = True
            outcome.not_measured += [NotMeasured(one.name, INTERRUPTED) for one in waiting]
        return outcome

    def _against(self, waiting: list[Entry], outcome: Outcome) -> None:
        """Measure the first that waits, then the others against it; who is done with waits no more."""
        baseline, used = waiting[0], self._device_memory()
        self._progress(f"{baseline.name}: warm-up", 0)
        with ContenderProcess(baseline) as first:
            first.warm()
            memory = [self._device_memory()]
            stages, itself = self._stages(first), f"{baseline.name} against itself"
            memory.append(self._device_memory())
            try:
                with ContenderProcess(baseline) as again:
                    first.load_seconds = again.load_seconds  # the first filled the caches that all others find
                    again.warm()
                    self._stages(again)  # see `_other`
                    quads = self._rounds(first, again, itself)
                outcome.null, blocks = ratio(quads), first_blocks(quads)
            except ContenderError as error:  # no room for two of them, say
                if first.has_failed:
                    raise
                outcome.not_measured.append(NotMeasured(itself, str(error)))
                blocks = [first.block() for _ in range(2 * self._pairs)]
            memory.append(self._device_memory())
            device = _largest_difference(memory, used)
            outcome.contenders.append(self._speed(baseline, first, bootstrap(blocks), None, stages, device))
            waiting.pop(0)
            while waiting:
                try:
                    other, quads = self._other(first, waiting[0])
                    outcome.contenders.append(other)
                    waiting.pop(0)
                    blocks += first_blocks(quads)  # machines drift: its seconds are those of the whole run
                    outcome.contenders[0] = self._speed(baseline, first, bootstrap(blocks), None, stages, device)
                except ContenderError as error:
                    if first.has_failed:
                        reason = f"the baseline failed meanwhile, and there is nothing to compare with: {error}"
                        outcome.not_measured += [NotMeasured(one.name, reason) for one in waiting]
                        waiting.clear()
                        return
                    outcome.not_measured.append(NotMeasured(waiting.pop(0).name, str(error)))

    def _other(self, first: ContenderProcess, entry: Entry) -> tuple[Speed, list[Quad]]:
        used = self._device_memory()
        self._progress(f"{entry.name}: warm-up", 0)
        with ContenderProcess(entry) as second:
            second.warm()
            memory = [self._device_memory()]
            stages = self._stages(second)  # first, as of the baseline: what a VAE leaves in the allocator counts later
            memory.append(self._device_memory())
            quads = self._rounds(first, second, entry.name)
            memory.append(self._device_memory())
            device = _largest_difference(memory, used)
            return self._speed(entry, second, second_seconds(quads), ratio(quads), stages, device), quads

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


def _largest_difference(readings: Sequence[float | None], before: float | None) -> float | None:
    known = [reading for reading in readings if reading is not None]
    return max(known) - before if known and before is not None else None
