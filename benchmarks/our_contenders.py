"""Our side of a speed run: a bundle in one of our back-ends, and what people deploy who have no bundle.

Imported in the contender's own process, which never sees PyTorch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ipa.benchmarks.contender import Setting, encoded_pictures
from ipa.benchmarks.random_inputs import random_inputs
from ipa.engines.bundle import Bundle
from ipa.engines.engine import Array, Engine, GraphFile
from ipa.engines.registry import open_engine
from ipa.engines.spec import ComponentSpec, TensorSpec
from ipa.runtime.beginning import Beginning
from ipa.runtime.denoise import Guidance, Step, denoise
from ipa.runtime.pipeline import Pipeline
from ipa.runtime.preparation import Preparation


def timed_steps(steps: Iterator[Step], count: int) -> float:
    """Seconds of the first `count` steps; where latents stay on a device, the last one waits for them."""
    start = time.perf_counter()
    for _ in islice(steps, count):
        pass
    return time.perf_counter() - start


class OurPipeline:
    """A bundle in one of our back-ends: the loop and the engines of `ipa.runtime.Pipeline`."""

    def __init__(self, bundle: str, engine: str, setting: Mapping[str, Any]) -> None:
        self._setting = Setting(**setting)
        self._pipe = Pipeline.open(bundle, engine=engine)
        self._request = self._setting.request()
        self.dtype = self._pipe.component("unet").precision
        self.stages = engine_stages(self._pipe.bundle, self._pipe.component, self._setting)

    def block(self) -> tuple[float, None]:
        """See `Contender`."""
        return timed_steps(self._pipe.steps(self._request), self._setting.block_steps), None


class PlainPipeline:
    """Ordinary graphs in onnxruntime, arrays of numpy in and out, driven by our loop.

    The adapter and all keys and values are computed inside the graph at every step, as other exporters have it.
    """

    def __init__(self, bundle: str, merged: str, setting: Mapping[str, Any], engine: str) -> None:
        """Open the graph that `ipa-export onnx --merged` wrote, and the bundle's other graphs without variants.

        Args:
            engine: `onnxruntime` or `onnxruntime-cuda`.
        """
        self._setting = Setting(**setting)
        opened = Bundle.open(Path(bundle), verify=False)  # most of its graphs are not used
        self._unet = merged_engine(Path(merged), engine)
        self.dtype = self._unet.precision
        run = Preparation(opened).run(self._setting.request())
        self._schedule = run.schedule
        self._free = _free_axes(opened, self._setting)
        rng = np.random.default_rng(0)
        inputs = random_inputs(self._unet.spec, {**self._free, "batch": self._setting.unet_batch}, rng)
        shape = inputs.pop("sample")[: self._setting.images].shape
        del inputs["timestep"]
        noise = rng.standard_normal(shape, np.float32)
        self._conditions = inputs
        self._begin = Beginning(noise * np.float32(run.schedule.init_noise_sigma), lambda: noise)
        kept: dict[str, Engine] = {}

        def component(name: str) -> Engine:
            if name not in kept:
                kept[name] = open_engine(engine, opened.graph(name))
            return kept[name]

        self.stages = engine_stages(opened, component, self._setting, is_plain=True)

    def block(self) -> tuple[float, None]:
        """See `Contender`."""
        guidance = Guidance(self._setting.guidance_scale) if self._setting.guidance_scale > 1 else None

        def conditions(index: int, sample: Array, timestep: float) -> Mapping[str, Array]:
            return self._conditions

        steps = denoise(self._unet, self._schedule, self._begin, conditions, guidance)
        return timed_steps(steps, self._setting.block_steps), None


class SingleGraph:
    """One call of one graph with random inputs."""

    def __init__(self, engine: Engine, free: Mapping[str, int]) -> None:
        self.dtype, self.stages = engine.precision, dict[str, Callable[[], object]]()
        self._engine, self._inputs = engine, random_inputs(engine.spec, free, np.random.default_rng(0))
        for name, array in self._inputs.items():  # as in a run, where the others change at each step
            array.flags.writeable = name in ("sample", "timestep")

    def block(self) -> tuple[float, None]:
        """See `Contender`."""
        start = time.perf_counter()
        self._engine(**self._inputs)
        return time.perf_counter() - start, None


def open_unet(bundle: str, engine: str, free: Mapping[str, int]) -> SingleGraph:
    """The hoisted UNet of a bundle; `free` are the sizes of its free axes, `tokens` among them."""
    return SingleGraph(Bundle.open(Path(bundle), verify=False).open_component("unet", engine), free)


def open_merged(file: str, engine: str, free: Mapping[str, int]) -> SingleGraph:
    """A graph of `ipa-export onnx --merged` in onnxruntime."""
    return SingleGraph(merged_engine(Path(file), engine), free)


def open_graph(file: str, description: str, engine: str, free: Mapping[str, int]) -> SingleGraph:
    """Any graph; the file `description` has its inputs and outputs."""
    spec = read_spec(json.loads(Path(description).read_text("utf-8")))
    return SingleGraph(open_engine(engine, GraphFile("unet", spec, Path(file))), free)


def merged_engine(file: Path, engine: str) -> Engine:
    """A graph of `ipa-export onnx --merged`, as its `.meta.json` describes it."""
    meta = json.loads(file.with_name(f"{file.name}.meta.json").read_text("utf-8"))
    return open_engine(engine, GraphFile(file.name, read_spec(meta), file))


def read_spec(record: Mapping[str, Any]) -> ComponentSpec:
    """Inputs and outputs, of JSON."""

    def tensors(entries: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(entry["name"], tuple(entry["axes"]), entry["dtype"]) for entry in entries)

    return ComponentSpec(tensors(record["inputs"]), tensors(record["outputs"]))


def engine_stages(
    bundle: Bundle, component: Callable[[str], Engine], setting: Setting, is_plain: bool = False
) -> dict[str, Callable[[], object]]:
    """What runs once for a picture, on random inputs.

    Args:
        component: opens an engine, or gives the one that is open.
        is_plain: keys and values of text and image belong to the step, not to a stage.
    """
    manifest, rng = bundle.manifest, np.random.default_rng(0)
    sizes = _free_axes(bundle, setting)

    def call(name: str, rows: int, times: int = 1) -> Callable[[], object]:
        engine = component(name)
        inputs = random_inputs(engine.spec, {**sizes, "batch": rows}, rng)
        return lambda: [engine(**inputs) for _ in range(times)]

    text = [name for name in ("text_encoder", "text_encoder_2", "text_kv") if name in manifest.components]
    text_calls = [call(name, 2) for name in text if not (is_plain and name == "text_kv")]
    stages: dict[str, Callable[[], object]] = {"text": lambda: [one() for one in text_calls]}
    if setting.has_image:
        stages["image"] = call("image_encoder", 1)
        if not is_plain:
            stages["adapter"] = call(f"ip_adapter/{manifest.defaults.adapter}", 2)
    if setting.task in ("img2img", "inpaint"):
        channels = manifest.components["unet"].spec.inputs[0].axes[1]
        stages["vae_encoder"] = call("vae_encoder", 1, encoded_pictures(setting.task, int(channels)))
    stages["vae_decoder"] = call("vae_decoder", 1, setting.images)
    return stages


def _free_axes(bundle: Bundle, setting: Setting) -> dict[str, int]:
    """Sizes of all free axes but the batch."""
    downscale = bundle.manifest.vae.downscale
    height, width = setting.height // downscale, setting.width // downscale
    return {"latent_height": height, "latent_width": width, "height": setting.height, "width": setting.width}
