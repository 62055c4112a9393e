"""The loop with latents that stay on the GPU against the same engine with the loop in numpy: difference and time."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ipa.benchmarks.random_inputs import random_inputs
from ipa.benchmarks.rounds import interleave, ratio
from ipa.engines.bundle import Bundle
from ipa.engines.engine import Array, Engine
from ipa.engines.linear_run import DenoisingEngine
from ipa.runtime.beginning import Beginning
from ipa.runtime.denoise import Guidance, Step, denoise
from ipa.runtime.schedulers import create_scheduler

STEPS = 10
GUIDANCE = Guidance(5.0)
TOLERANCE = 1e-2  # relative, of the final latents: float16 rounds samples that differ in float32's last place apart


class _HostLoop:
    """An engine without its own loop."""

    def __init__(self, engine: Engine) -> None:
        self.spec, self._engine = engine.spec, engine

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        return self._engine(**inputs)


def device_loop(bundle: Bundle, engine: str, side: int, tokens: int, rounds: int) -> dict[str, Any] | None:
    """Compare both loops, one picture with guidance.

    Args:
        side: of the latents.
        tokens: of the image prompt.
        rounds: counted ones.
    Returns:
        `None`: the engine has no loop of its own.
    """
    with bundle.open_component("unet", engine) as unet:
        if not isinstance(unet, DenoisingEngine):
            return None
        config = json.loads(bundle.file(bundle.manifest.scheduler).read_text())
        schedule = create_scheduler("euler", config).schedule(STEPS)
        free = {"batch": 2, "latent_height": side, "latent_width": side, "tokens": tokens}
        inputs = random_inputs(unet.spec, free, np.random.default_rng(0))
        noise = np.random.default_rng(1).standard_normal(inputs.pop("sample")[:1].shape, np.float32)
        del inputs["timestep"]
        for array in inputs.values():  # as in a run
            array.flags.writeable = False
        begin = Beginning(noise * np.float32(schedule.init_noise_sigma), lambda: noise)

        def given(index: int, sample: Array, timestep: float) -> Mapping[str, Array]:
            return inputs

        def loop(contender: Any) -> list[Step]:
            return list(denoise(contender, schedule, begin, given, GUIDANCE))

        contenders = {"device": unet, "host": _HostLoop(unet)}
        found, expected = (loop(contender)[-1].latents for contender in contenders.values())
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        seconds = interleave({name: partial(loop, contender) for name, contender in contenders.items()}, rounds)
    return {
        "passed": error <= TOLERANCE,
        "relative_error": error,
        "milliseconds_a_step": {name: 1e3 * statistics.median(times) / STEPS for name, times in seconds.items()},
        "speedup_over_host": ratio(seconds["host"], seconds["device"]),
    }
