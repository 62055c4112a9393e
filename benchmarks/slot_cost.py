"""What room for more image prompts, or for masks, costs a step: the UNets of two bundles in turn, one prompt in both.

Two bundles of the models that `python -m ipa.benchmarks.full_size --output /tmp/sd15` writes:

    ipa-export onnx --base /tmp/sd15/base --adapter /tmp/sd15/ip-adapter.safetensors --output /tmp/sd15/bundle
    ipa-export onnx ... --image-slots 2 --masks --output /tmp/sd15/masked
    python -m ipa.benchmarks.slot_cost --bundle /tmp/sd15/bundle --other /tmp/sd15/masked
"""

from __future__ import annotations

import json
import statistics
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import click
import numpy as np

from ipa.benchmarks.command import Command
from ipa.benchmarks.random_inputs import random_inputs
from ipa.benchmarks.rounds import interleave, ratio
from ipa.engines.bundle import Bundle

TOKENS = 4


@click.command("slot_cost", cls=Command)
@click.option("--bundle", type=click.Path(path_type=Path), required=True, help="The one to compare with.")
@click.option("--other", type=click.Path(path_type=Path), required=True, help="The same with more slots, or masks.")
@click.option("--engine", default="onnxruntime", show_default=True, help="Back-end.")
@click.option("--rounds", default=5, show_default=True, help="Counted rounds.")
def main(bundle: Path, other: Path, engine: str, rounds: int) -> None:
    """Print the seconds of a step with guidance of each, and the ratio of the other to the first."""
    with ExitStack() as stack:
        steps = {}
        for name, root in (("bundle", bundle), ("other", other)):
            opened = Bundle.open(root, verify=False)
            unet = stack.enter_context(opened.open_component("unet", engine))
            defaults, downscale = opened.manifest.defaults, opened.manifest.vae.downscale
            free = {"batch": 2, "latent_height": defaults.height // downscale, "tokens": TOKENS}
            free |= {"latent_width": defaults.width // downscale}
            free |= {str(tensor.axes[1]): 1 for tensor in unet.spec.inputs if tensor.name.startswith("image_kv_")}
            steps[name] = partial(unet, **random_inputs(unet.spec, free, np.random.default_rng(0)))
        seconds = interleave(steps, rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    click.echo(json.dumps({"seconds_median": medians, "other_over_bundle": ratio(seconds["other"], seconds["bundle"])}))


if __name__ == "__main__":
    main()
