"""What the image prompt costs a step, by the nodes of the UNet's graph that are there for it alone.

It is so little that two processes of the same graph can differ by more for as long as they live, as chance placed
their memory. Timing steps with and without does not find it then; onnxruntime's profile has it within one run.

    python -m ipa.benchmarks.image_nodes --bundle sd15-bundle
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime as ort
from tqdm import tqdm

from ipa.benchmarks.command import Command
from ipa.benchmarks.intervals import Interval, bootstrap
from ipa.benchmarks.random_inputs import random_inputs
from ipa.engines.bundle import Bundle
from ipa.engines.errors import IpaError
from ipa.engines.machine import available_cores
from ipa.engines.spec import ComponentSpec

ENGINE = "onnxruntime"
_KERNEL = "_kernel_time"
_LEFT_OUT = ("Cast", "Identity")  # where they change nothing, onnxruntime leaves them out


@click.command("image_nodes", cls=Command)
@click.option("--bundle", type=click.Path(path_type=Path), required=True, help="What `ipa-export onnx` wrote.")
@click.option("--tokens", default=4, show_default=True, type=click.IntRange(1), help="Of the image prompt.")
@click.option("--runs", default=9, show_default=True, type=click.IntRange(1), help="Steps, after one to warm up.")
def main(bundle: Path, tokens: int, runs: int) -> None:
    """Print the seconds of a step with guidance on onnxruntime, and how much of it are the image prompt's nodes."""
    opened = Bundle.open(bundle, verify=False)
    manifest, graph = opened.manifest, opened.graph("unet", ENGINE)
    downscale = manifest.vae.downscale
    free = {"batch": 2, "tokens": tokens}
    free |= {"latent_height": manifest.defaults.height // downscale}
    free |= {"latent_width": manifest.defaults.width // downscale}
    free |= {str(tensor.axes[1]): tokens for tensor in graph.spec.inputs if tensor.name.startswith("image_kv")}
    nodes = image_nodes(onnx.load(graph.path, load_external_data=False))
    steps, shares = profile(graph.path, graph.spec, free, nodes, runs)
    found = {"nodes": len(nodes), "step_seconds": asdict(steps), "share_of_the_image_prompt": asdict(shares)}
    click.echo(json.dumps(found))


def image_nodes(model: onnx.ModelProto) -> dict[str, str]:
    """Names and operators of the nodes that a UNet without image prompt would not have.

    Whatever depends on the image prompt and constants alone, attention to it, and the sums that take the result in.
    """
    constant = {tensor.name for tensor in model.graph.initializer}
    given = {tensor.name for tensor in model.graph.input if tensor.name.startswith(("image_kv", "image_mask"))}
    shown: set[str] = set()  # what attention made of it
    found: dict[str, str] = {}
    for node in model.graph.node:
        inputs = [name for name in node.input if name]
        if all(name in constant for name in inputs):
            constant |= set(node.output)
        elif all(name in given | constant for name in inputs):
            found[node.name] = node.op_type
            given |= set(node.output)
        elif node.op_type == "MultiHeadAttention" and set(node.input[1:]) <= given:
            found[node.name] = node.op_type
            shown |= set(node.output)
        elif shown & set(inputs):
            found[node.name] = node.op_type
            if node.op_type != "Add":  # a mask
                shown |= set(node.output)
    return found


def profile(
    file: Path, spec: ComponentSpec, free: dict[str, int], nodes: Mapping[str, str], runs: int
) -> tuple[Interval, Interval]:
    """Seconds of a step, and the share of it that some nodes take.

    Raises:
        IpaError: onnxruntime has fused one of the nodes into another, so that it has no time of its own.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = available_cores()
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "step")
        session = ort.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])
        inputs = random_inputs(spec, free, np.random.default_rng(0))
        for _ in tqdm(range(runs + 1), unit="step", disable=None):
            session.run(None, inputs)
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    steps = [event["dur"] / 1e6 for event in events if event["name"] == "model_run"]
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event["name"].endswith(_KERNEL):
            kernels[event["name"].removesuffix(_KERNEL)].append(event["dur"] / 1e6)
    timed = [name for name in nodes if len(kernels[name]) == len(steps)]
    missing = [name for name, operator in nodes.items() if operator not in _LEFT_OUT and name not in timed]
    if missing or not timed:
        raise IpaError(f"{file}: onnxruntime has no times of {', '.join(missing) or 'nodes of an image prompt'}")
    own = np.sum([kernels[name] for name in timed], axis=0)
    return bootstrap(steps[1:]), bootstrap((own / np.array(steps))[1:].tolist())


if __name__ == "__main__":
    main()
