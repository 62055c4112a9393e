"""A machine with a GPU, for subprocesses of tests.

There is none here: NVIDIA's own Python bindings run on a libcuda that keeps "device" memory on the host
(tests/fake_libcuda.c), and TensorRT is one that computes by onnxruntime (tests/fake_tensorrt). What is tested is ours:
which plan is taken, what is copied when, the CUDA graph, our kernels as C, and every message. On a GPU:
`make gpu-check`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ipa.engines.bundle import Bundle
from ipa.engines.cuda_driver import NoDriver, find_driver
from ipa.engines.machine import platform_name
from ipa.engines.plan_cache import PlanCache
from ipa.engines.plan_choice import ANY_CAPABILITY
from ipa.engines.plan_file import RECIPE, PlanKey
from ipa.engines.shape_profile import ShapeProfile, as_text

HERE = Path(__file__).parent
PROFILE = ShapeProfile.parse(["128x128", "64x64"], "1:1:2", "4:4:8")
REQUEST = ("--prompt", "a cat", "--seed", "3", "--steps", "4", "--height", "64", "--width", "96", "--format", "json")
Change = Callable[[PlanKey], PlanKey]

STANDS_IN = [  # marks
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the stand-in for the driver needs gcc"),
    pytest.mark.skipif(not isinstance(find_driver(), NoDriver), reason="there is a GPU: run `make gpu-check`"),
]


def environment(folder: Path) -> dict[str, str]:
    """The environment of a machine with a GPU; its driver is compiled into `folder`."""
    library, source = os.fspath(folder / "libcuda.so.1"), os.fspath(HERE / "fake_libcuda.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-x", "c", "-o", library, source], check=True)
    paths = [os.fspath(HERE / "fake_tensorrt"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "LD_LIBRARY_PATH": os.fspath(folder), "PYTHONPATH": os.pathsep.join(paths)}


def for_rtx(key: PlanKey) -> PlanKey:
    """As TensorRT-RTX builds it for all GPUs; the version names the CUDA of the package that is installed here."""
    return replace(key, engine="tensorrt-rtx", version="11.0.0.1 cu13", target=ANY_CAPABILITY)


def store_plans(cache: Path, bundle: Path, change: Change = lambda key: key) -> None:
    """A plan for every component, as a build on this machine would leave it but for `change`."""
    manifest, plans = Bundle.open(bundle, verify=False).manifest, PlanCache(cache)
    adapters = {f"ip_adapter/{name}": record.component for name, record in manifest.adapters.items()}
    for name, record in {**manifest.components, **adapters}.items():
        profile = as_text(PROFILE.shapes(name, record.spec, manifest.vae.downscale))
        key = PlanKey(
            name, record.sha256, record.dtype, "tensorrt", "11.0.0.1", "9.0 Fake GPU", profile, platform_name(), RECIPE
        )
        with plans.workspace() as folder:
            (folder / "plan").write_text(os.fspath(bundle / record.files[0].path))
            plans.store(change(key), folder / "plan", bundle, {}, 1.0, 1.0)


def run(gpu: dict[str, str], cache: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from ipa.runtime.cli import main; main()", *map(os.fspath, arguments)]
    return subprocess.run(command, env={**gpu, "IPA_CACHE": str(cache)}, capture_output=True, text=True)


def script(gpu: dict[str, str], text: str, *arguments: Path | str) -> Any:
    """What a script prints, as JSON."""
    command = [sys.executable, "-c", text, *map(os.fspath, arguments)]
    done = subprocess.run(command, env=gpu, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def random_picture(path: Path) -> Path:
    """A picture to show the adapter, written to `path`."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)).save(path)
    return path
