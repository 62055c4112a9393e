"""Peak memory of one whole request, each contender in a process of its own: diffusers, and `ipa-run` on each engine.

What is measured is the largest resident set, as the system counts it, weights mapped from files included.

    python -m ipa.benchmarks.full_size --output /tmp/sd15
    ipa-export onnx --base /tmp/sd15/base --adapter /tmp/sd15/ip-adapter.safetensors --output /tmp/sd15/bundle
    python -m ipa.benchmarks.pipeline_memory --base /tmp/sd15/base --adapter /tmp/sd15/ip-adapter.safetensors \\
                                             --bundle /tmp/sd15/bundle
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import click
from tqdm import tqdm

from ipa.benchmarks.command import Command
from ipa.engines.bundle import Bundle
from ipa.engines.registry import BACKENDS
from ipa.runtime.demo import demo_bundle
from ipa.trainer.files import atomic_path

GUIDANCE = 5.0
DIFFUSERS = """
import sys
from pathlib import Path
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

base, adapter, image, steps, size, guidance, output = sys.argv[1:]
encoder = CLIPVisionModelWithProjection.from_pretrained(Path(base) / "image_encoder")
pipe = StableDiffusionPipeline.from_pretrained(
    base, image_encoder=encoder, feature_extractor=CLIPImageProcessorPil(), safety_checker=None
)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
file = Path(adapter)
pipe.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None)
sizes = {"height": int(size), "width": int(size), "num_inference_steps": int(steps), "guidance_scale": float(guidance)}
pipe("a cat", ip_adapter_image=Image.open(image), **sizes).images[0].save(output)
"""


@dataclass(frozen=True)
class Usage:
    """What a process took."""

    peak_mib: float
    seconds: float


def measure(command: list[str]) -> Usage:
    """Run a command to its end.

    Raises:
        click.ClickException: it failed; what it printed is the message.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            output.seek(0)
            raise click.ClickException(output.read().decode(errors="replace")[-2000:])
    return Usage(usage.ru_maxrss / 2**10, time.perf_counter() - start)


@click.command("pipeline_memory", cls=Command)
@click.option("--base", type=click.Path(exists=True), required=True, help="diffusers pipeline folder.")
@click.option("--adapter", type=click.Path(exists=True), required=True, help="IP-Adapter file.")
@click.option("--bundle", type=click.Path(exists=True), required=True, help="Its FP32 bundle.")
@click.option("--steps", default=2, show_default=True, help="More steps take longer, not more memory.")
@click.option("--size", default=512, show_default=True, help="Pixels.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("out"), help="Folder for the record.")
def main(base: str, adapter: str, bundle: str, steps: int, size: int, output: Path) -> None:
    """Measure, print a table; the record goes to OUTPUT/pipeline_memory.json."""
    opened = Bundle.open(Path(bundle), verify=False)
    image = os.fspath(demo_bundle().with_name("reference.png"))
    with tempfile.TemporaryDirectory() as folder:
        picture = os.fspath(Path(folder) / "x.png")
        ours = [os.fspath(Path(sys.executable).with_name("ipa-run")), "--bundle", bundle, "--image", image]
        ours += ["--prompt", "a cat", "--steps", str(steps), "--height", str(size), "--width", str(size)]
        ours += ["--guidance-scale", str(GUIDANCE), "--scheduler", "ddim", "--output", picture]
        theirs = [base, adapter, image, str(steps), str(size), str(GUIDANCE), picture]
        commands = {"diffusers": [sys.executable, "-c", DIFFUSERS, *theirs]}
        graphs = [opened.graph(name) for name in opened.manifest.components]
        engines = {engine.name: engine for engine in BACKENDS if engine.is_installed and not engine.obstacle(graphs)}
        commands |= {name: [*ours, "--engine", name] for name in engines}
        usages = {name: measure(command) for name, command in tqdm(commands.items(), disable=None)}
    reference = usages["diffusers"].peak_mib
    click.echo("| | peak memory | of diffusers' |\n|---|---|---|")
    for name, usage in usages.items():
        click.echo(f"| {name} | {usage.peak_mib / 2**10:.2f} GiB | {usage.peak_mib / reference:.2f} |")
    record = {
        "command": "python -m ipa.benchmarks.pipeline_memory",
        "steps": steps,
        "pixels": size,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("ipa-runtime", "torch", "diffusers")}
        | {name: engine.version for name, engine in engines.items()},
        "usage": {name: asdict(usage) for name, usage in usages.items()},
        "of_diffusers": {name: usage.peak_mib / reference for name, usage in usages.items()},
    }
    output.mkdir(parents=True, exist_ok=True)
    with atomic_path(output / "pipeline_memory.json") as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
