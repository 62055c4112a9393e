"""One step of the UNet with the image prompt on onnxruntime, against PyTorch eager without it, on the same CPU.

Three contenders run in turn, A B C C B A ..., in one process with the same number of threads, on random inputs:
PyTorch eager FP32, the ordinary UNet graph (no image prompt at all) and the bundle's hoisted UNet with 4 image tokens.
What is compared are medians of the ratios within each round, so that a drift of the machine's speed cancels.

    python -m ipa.benchmarks.full_size --output /tmp/sd15
    ipa-export onnx --base /tmp/sd15/base --adapter /tmp/sd15/ip-adapter.safetensors --output /tmp/sd15/bundle
    python -m ipa.benchmarks.step_speed --base /tmp/sd15/base --bundle /tmp/sd15/bundle
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from tqdm import tqdm

from ipa.engines.bundle import Bundle
from ipa.engines.engine import Engine
from ipa.engines.onnxruntime_engine import OnnxRuntimeEngine
from ipa.engines.spec import SPECS, ComponentSpec, TensorSpec
from ipa.export.onnx_export import Graph, export_graph

TOKENS = 4
OPSET = 18
TIMESTEP = 500.0


class PlainUNet(torch.nn.Module):
    """The UNet as other exporters write it: text states in, keys and values computed at every step."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """`noise_pred`."""
        return self.unet(sample, timestep, states, return_dict=False)[0]  # type: ignore[no-any-return]


def plain_engine(unet: UNet2DConditionModel, text_width: int, folder: Path) -> Engine:
    """The ordinary graph in an onnxruntime session."""
    sample, timestep, *_ = SPECS["unet"].inputs
    states = TensorSpec("encoder_hidden_states", ("batch", "text_tokens", text_width))
    sizes = {"unet_in_channels": 4, "latent_channels": 4, "text_tokens": 77}
    spec = ComponentSpec((sample, timestep, states), SPECS["unet"].outputs).resolved(sizes, "float32")
    export_graph(Graph("unet", PlainUNet(unet), spec), folder / "model.onnx", OPSET)
    return OnnxRuntimeEngine("unet", spec, folder / "model.onnx")


def random_inputs(spec: ComponentSpec, free: dict[str, int], rng: np.random.Generator) -> dict[str, Any]:
    """Standard normal values for every input; the timestep is fixed."""
    inputs = {}
    for tensor in spec.inputs:
        shape = [axis if isinstance(axis, int) else free[axis] for axis in tensor.axes]
        values = np.full(shape, TIMESTEP) if tensor.name == "timestep" else rng.standard_normal(shape)
        inputs[tensor.name] = values.astype(tensor.dtype)
    return inputs


def interleave(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender by round; the order turns around every round. The first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in tqdm(range(rounds + 1), unit="round", disable=None):
        names = list(contenders) if index % 2 else list(reversed(contenders))
        for name in names:
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median and range of the ratios within each round."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


@click.command()
@click.option("--base", type=click.Path(path_type=Path, exists=True), required=True, help="diffusers pipeline folder.")
@click.option("--bundle", type=click.Path(path_type=Path, exists=True), required=True, help="Its FP32 bundle.")
@click.option("--batch", default=2, help="UNet batch: 2 is one picture with guidance.")
@click.option("--size", default=512, help="Pixels.")
@click.option("--rounds", default=7, help="Counted rounds.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("out"), help="Folder for step_speed.json.")
def main(base: Path, bundle: Path, batch: int, size: int, rounds: int, output: Path) -> None:
    """Compare and print; the record goes to OUTPUT."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rng = np.random.default_rng(0)
    free = {"batch": batch, "latent_height": size // 8, "latent_width": size // 8, "tokens": TOKENS}
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float32).eval()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hoisted = stack.enter_context(Bundle.open(bundle).open_component("unet", "onnxruntime"))
        plain = stack.enter_context(plain_engine(unet, unet.config.cross_attention_dim, folder))
        plain_inputs = random_inputs(plain.spec, free, rng)
        hoisted_inputs = random_inputs(hoisted.spec, free, rng)
        tensors = {name: torch.from_numpy(array) for name, array in plain_inputs.items()}

        @torch.inference_mode()
        def eager() -> torch.Tensor:
            return unet(**tensors).sample  # type: ignore[no-any-return]

        contenders = {
            "torch_eager": eager,
            "onnxruntime_plain": lambda: plain(**plain_inputs),
            "onnxruntime_hoisted": lambda: hoisted(**hoisted_inputs),
        }
        seconds = interleave(contenders, rounds)
    record = {
        "command": "python -m ipa.benchmarks.step_speed",
        "model": "SD1.5, random weights, FP32" if unet.config.cross_attention_dim == 768 else base.name,
        "unet_batch": batch,
        "pixels": size,
        "image_tokens": TOKENS,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("ipa-runtime", "torch", "diffusers", "onnxruntime")},
        "seconds_median": {name: statistics.median(values) for name, values in seconds.items()},
        "speedup_over_torch_eager": ratio(seconds["torch_eager"], seconds["onnxruntime_hoisted"]),
        "hoisted_over_plain_graph": ratio(seconds["onnxruntime_hoisted"], seconds["onnxruntime_plain"]),
    }
    text = json.dumps(record, indent=1)
    output.mkdir(parents=True, exist_ok=True)
    (output / "step_speed.json").write_text(text + "\n")
    click.echo(text)


if __name__ == "__main__":
    main()
