"""One step of the UNet with the image prompt on each CPU engine, against PyTorch eager, in one process.

The contenders run in turn, A B C C B A ..., with the same number of threads, on random inputs: PyTorch eager FP32
without and with diffusers' IP-Adapter, and on each engine the bundle's hoisted UNet with 4 image tokens and the
ordinary graph without any image prompt. One large matrix product is among them: its rate, and the operations that a
step needs, say how fast FP32 can be on this machine. What is compared are medians of the ratios within each round, so
that a drift of the machine's speed cancels.

    python -m ipa.benchmarks.full_size --output /tmp/sd15
    ipa-export onnx --base /tmp/sd15/base --adapter /tmp/sd15/ip-adapter.safetensors --output /tmp/sd15/bundle
    python -m ipa.benchmarks.step_speed --base /tmp/sd15/base --adapter /tmp/sd15/ip-adapter.safetensors \\
                                        --bundle /tmp/sd15/bundle --engine onnxruntime
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ipa.benchmarks.plain_graph import PlainUNet
from ipa.benchmarks.random_inputs import random_inputs
from ipa.benchmarks.rounds import interleave, ratio
from ipa.engines.bundle import Bundle
from ipa.engines.engine import Engine, GraphFile
from ipa.engines.machine import available_cores
from ipa.engines.registry import BACKENDS, open_engine
from ipa.engines.spec import SPECS, ComponentSpec, TensorSpec
from ipa.export import winograd
from ipa.export.adapter_kinds import BASE
from ipa.export.adapters import AdapterWeights, read_adapter
from ipa.export.controlnets import TextAttention
from ipa.export.dimensions import manifest_dimensions
from ipa.export.onnx_export import Graph, export_graph
from ipa.export.oracle import DiffusersStep

TOKENS = 4
OPSET = 18
MATRIX = 4096
PLAIN_INPUTS = ("sample", "timestep", "encoder_hidden_states")
ENGINES = {backend.name: backend for backend in BACKENDS if not backend.needs_gpu}  # the others: gpu_check


def plain_engine(unet: UNet2DConditionModel, folder: Path, engine: str, free: Mapping[str, int]) -> Engine:
    """The graph without image prompt, in a back-end; `free` are the sizes of its free axes."""
    sample, timestep, *_ = SPECS["unet"].inputs
    states = TensorSpec("encoder_hidden_states", ("batch", "text_tokens", unet.config.cross_attention_dim))
    sizes = {"unet_in_channels": 4, "latent_channels": 4, "text_tokens": 77}
    spec = ComponentSpec((sample, timestep, states), SPECS["unet"].outputs).resolved(sizes, "float32")
    processors = unet.attn_processors
    unet.set_attn_processor(TextAttention())
    path, *_ = export_graph(Graph("unet", PlainUNet(unet), spec), folder / "model.onnx", OPSET)
    unet.set_attn_processor(processors)
    if engine == winograd.ENGINE:  # what the bundle has too
        path = winograd.write_winograd_graph(path, free) or path
    return open_engine(engine, GraphFile("unet", spec, path))


class Eager:
    """PyTorch on the same inputs, without or with diffusers' IP-Adapter."""

    def __init__(self, unet: UNet2DConditionModel, weights: AdapterWeights, inputs: Mapping[str, Any]) -> None:
        self._unet, self._without = unet, unet.attn_processors
        width = weights.projection["proj.weight"].shape[1]
        self._inputs = {**inputs, "image_embeds": np.ones((len(inputs["sample"]), width), np.float32)}
        self._step = DiffusersStep(unet, weights)
        self._with = unet.attn_processors

    @torch.inference_mode()
    def without_image(self) -> None:
        """One step of the base model."""
        self._unet.set_attn_processor(dict(self._without))
        self._unet(*(torch.from_numpy(self._inputs[name]) for name in PLAIN_INPUTS))

    def with_image(self) -> None:
        """One step with the adapter, its projection included."""
        self._unet.set_attn_processor(dict(self._with))
        self._step(self._inputs, 1.0)


def operations(unet: UNet2DConditionModel, inputs: Sequence[Tensor]) -> int:
    """Floating-point operations of a step without image prompt: 2 for each multiply-add."""
    meta = UNet2DConditionModel.from_config(unet.config).to("meta")
    with FlopCounterMode(display=False) as counter:
        meta(*(tensor.to("meta") for tensor in inputs))
    return int(counter.get_total_flops())


@click.command()
@click.option("--base", type=click.Path(path_type=Path, exists=True), required=True, help="diffusers pipeline folder.")
@click.option("--adapter", type=click.Path(path_type=Path, exists=True), required=True, help="IP-Adapter file.")
@click.option("--bundle", type=click.Path(path_type=Path, exists=True), required=True, help="Its FP32 bundle.")
@click.option(
    "--engine",
    "engines",
    type=click.Choice(list(ENGINES)),
    multiple=True,
    default=["onnxruntime"],
    show_default=True,
    help="More than once: all in turn; each takes two copies of the UNet in memory.",
)
@click.option("--batch", default=2, help="UNet batch: 2 is one picture with guidance.")
@click.option("--size", default=512, help="Pixels.")
@click.option("--rounds", default=7, help="Counted rounds.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("out"), help="Folder for the record.")
def main(
    base: Path, adapter: Path, bundle: Path, engines: tuple[str, ...], batch: int, size: int, rounds: int, output: Path
) -> None:
    """Compare and print; the record goes to OUTPUT/step_speed_ENGINE.json."""
    torch.set_num_threads(available_cores())
    rng = np.random.default_rng(0)
    free = {"batch": batch, "latent_height": size // 8, "latent_width": size // 8, "tokens": TOKENS}
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float32).eval()
    opened = Bundle.open(bundle)
    weights = read_adapter(adapter, opened.manifest.kv_layout, manifest_dimensions(opened.manifest))
    if weights.kind is not BASE:
        raise click.UsageError(f"--adapter {adapter} is of the kind {weights.kind.name}; a base one is compared")
    matrix = torch.randn(MATRIX, MATRIX)
    contenders: dict[str, Callable[[], object]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        precisions = {}
        for name in engines:
            hoisted = stack.enter_context(opened.open_component("unet", name))
            plain = stack.enter_context(plain_engine(unet, folder, name, free))
            hoisted_inputs = random_inputs(hoisted.spec, free, rng)
            plain_inputs = random_inputs(plain.spec, free, rng)
            contenders[f"{name}_hoisted"] = partial(hoisted, **hoisted_inputs)
            contenders[f"{name}_without_image"] = partial(plain, **plain_inputs)
            precisions[name] = hoisted.precision
        flops = operations(unet, [torch.from_numpy(plain_inputs[name]) for name in PLAIN_INPUTS])
        eager = Eager(unet, weights, plain_inputs)
        contenders |= {
            "torch_eager": eager.without_image,
            "torch_eager_ip_adapter": eager.with_image,
            "matrix_product": lambda: matrix @ matrix,
        }
        seconds = interleave(contenders, rounds)
    gflops = 2 * MATRIX**3 / statistics.median(seconds["matrix_product"]) / 1e9
    record = {
        "command": f"python -m ipa.benchmarks.step_speed {' '.join(f'--engine {name}' for name in engines)}",
        "model": "SD1.5, random weights" if unet.config.cross_attention_dim == 768 else base.name,
        "precision": {"torch": "float32", **precisions},
        "unet_batch": batch,
        "pixels": size,
        "image_tokens": TOKENS,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("ipa-runtime", "torch", "diffusers")}
        | {name: ENGINES[name].version for name in engines},
        "seconds_median": {name: statistics.median(values) for name, values in seconds.items()},
        "engines": {
            name: {
                "speedup_over_torch_eager": ratio(seconds["torch_eager"], seconds[f"{name}_hoisted"]),
                "speedup_over_torch_eager_ip_adapter": ratio(
                    seconds["torch_eager_ip_adapter"], seconds[f"{name}_hoisted"]
                ),
                "with_over_without_image": ratio(seconds[f"{name}_hoisted"], seconds[f"{name}_without_image"]),
            }
            for name in engines
        },
        "step_gflop": flops / 1e9,
        "matrix_product_gflops": gflops,
        "seconds_at_that_rate": flops / 1e9 / gflops,
    }
    text = json.dumps(record, indent=1)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"step_speed_{'_'.join(engines)}.json").write_text(text + "\n")
    click.echo(text)


if __name__ == "__main__":
    main()
