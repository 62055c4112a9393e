"""Benchmark records made by hand, and a folder of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ipa.benchmarks.intervals import Interval
from ipa.benchmarks.records import (
    Difference,
    Gap,
    NotMeasured,
    Origin,
    Overhead,
    Quality,
    QualityRecord,
    Record,
    Speed,
    SpeedRecord,
    StartUp,
    Sweep,
    write_record,
)

HOSTILE = "<script>alert(1)</script> $x$ | *a* `b` & \"c\" <!-- id='z'"
MACHINE = {"system": "Linux x86_64", "cpu": "Test CPU 3000", "cores": 2, "memory_gib": 15.6, "gpu": ""}
ORIGIN = Origin(
    "ipa-bench speed --output out", "2026-01-02T03:04:05+00:00", MACHINE, {"torch": "2.13.0", "numpy": "2.4"}
)
SETTING: dict[str, Any] = {
    **{"model": "demo", "model_title": "the demo model", "task": "variation", "images": 2, "unet_batch": 4},
    **{
        "height": 64,
        "width": 72,
        "steps": 25,
        "unet_calls": 25,
        "scheduler": "ddim",
        "guidance_scale": 3.5,
        "pairs": 9,
        "threads": 2,
    },
}


def contender(name: str, step: float = 2.0, ratio: Interval | None = None, **fields: Any) -> Speed:
    usual: dict[str, Any] = {
        **{"title": f"what {name} is", "dtype": "float32", "step_seconds": Interval(step, step - 0.25, step + 0.25, 9)},
        **{"device_step_seconds": None, "ratio": ratio, "stage_seconds": {}, "seconds_per_image": 25.5},
        **{"images_per_second": 0.0392, "first_call_seconds": 8.12, "load_seconds": 4.56, "build_seconds": None},
        **{"peak_host_mib": 5316.0, "peak_device_mib": None, "floor_seconds": None, "times_floor": None},
        **{"warm_up_blocks": 3, "is_settled": True},
    }
    return Speed(name=name, **(usual | fields))


def speed(*contenders: Speed, **fields: Any) -> SpeedRecord:
    usual: dict[str, Any] = {
        **{"origin": ORIGIN, "setting": SETTING, "gflop": {}, "rates": {}, "baseline": "torch-eager"},
        **{"null": Interval(1.0, 0.99, 1.01, 9), "contenders": list(contenders)},
    }
    return SpeedRecord(**(usual | fields))


BASELINE = contender("torch-eager")
FULL_SPEED = speed(
    contender("torch-eager", stage_seconds={"text": 0.123, "image": 0.321, "vae_decoder": 1.47}),
    contender("torch-compile", 1.9, Interval(1.03, 0.98, 1.07, 9), is_settled=False, warm_up_blocks=10),
    contender(
        "onnxruntime",
        1.25,
        Interval(1.504, 1.461, 1.552, 9),
        **{"dtype": "bfloat16", "device_step_seconds": 1.19, "stage_seconds": {"text": 0.0456, "adapter": 0.00789}},
        **{"build_seconds": 77.7, "peak_device_mib": 1234.0, "floor_seconds": 1.11, "times_floor": 1.126},
    ),
    contender(HOSTILE, 4.0, Interval(0.5, 0.48, 0.52, 9)),
    gflop={"unet": 803.3, "vae_decoder": 2514.5},
    rates={"matmul_gflops": {"float32": 188.4}, "bandwidth_gb_per_second": 12.7},
    overhead=[
        Overhead("hoisted, 4 tokens", "onnxruntime", 4, 1.26, 1.25, Interval(1.004, 0.997, 1.012, 9)),
        Overhead("in the graph", "torch-eager", 16, 2.11, 2.0, Interval(1.055, 1.051, 1.062, 9)),
    ],
    start_up=[StartUp("torch + diffusers", 6.31, 612.0, 1893.0)],
    not_measured=[NotMeasured("tensorrt", "no NVIDIA GPU")],
)
ARMS = [
    Quality(
        "engine",
        "ours",
        Interval(0.812, 0.801, 0.823, 64),
        Interval(0.254, 0.248, 0.258, 64),
        Interval(0.611, 0.595, 0.633, 64),
        Interval(23.4, 22.7, 24.3, 64),
        {"foreground colour": Interval(0.953, 0.906, 0.984, 64)},
        0.412,
    ),
    Quality("torch-eager", "diffusers", Interval(0.813, 0.802, 0.824, 64), None, None, None, {}, 0.702),
    Quality("base", "no image prompt", Interval(0.552, 0.531, 0.574, 64), None, None, None, {}, 0.388),
]
FULL_QUALITY = QualityRecord(
    replace(ORIGIN, command="ipa-bench quality --samples 4"),
    {
        **SETTING,
        "bundle": "demo",
        "images": 64,
        "samples": 4,
        "engine": "onnxruntime",
        "fid_resize": "299x299, bicubic",
    },
    ARMS,
    [
        Gap("engine", "base", "clip_i", Interval(0.26, 0.243, 0.2778, 64)),
        Gap("engine", "torch-eager", "clip_i", Interval(-0.001, -0.0021, 0.0004, 64)),
        Gap("engine", "base", "clip_t", Interval(-0.0271, -0.0313, -0.0229, 64)),
    ],
    [
        Difference(
            *("engine", "torch-eager", Interval(0.125, 0.0625, 0.1875, 64), Interval(45.2, 44.1, 46.3, 60), 38.8),
            Interval(0.021, 0.019, 0.024, 64),
        )
    ],
    Sweep(
        *(8, 1, [0.0, 0.25, 1.0]),
        [Interval(0.552, 0.521, 0.584, 8), Interval(0.667, 0.641, 0.688, 8), Interval(0.812, 0.793, 0.833, 8)],
        [Interval(0.281, 0.262, 0.301, 8), Interval(0.272, 0.251, 0.291, 8), Interval(0.254, 0.233, 0.274, 8)],
        "sweep.png",
    ),
    [NotMeasured("DINO of base", "no --dino DIR")],
)


def write(folder: Path, **records: Record) -> Path:
    """Records in a folder, with a contact sheet and a JSON file of another kind."""
    folder.mkdir(exist_ok=True)
    for name, record in records.items():
        write_record(record, folder / f"{name}.json")
    Image.new("RGB", (40, 30), "red").save(folder / "sweep.png")
    (folder / "other.json").write_text('{"command": "of another benchmark"}')
    return folder
