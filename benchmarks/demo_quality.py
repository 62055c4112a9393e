"""How well the demo model follows text and image: rates on 64 held-out pairs, and a contact sheet.

The text names a shape, the image prompt shows another shape in the colours and the texture that are wanted; training
never drew that combination. The pictures are made by the torch-free runtime; a judge trained apart names their shape.

    python -m ipa.benchmarks.demo_quality --output benchmarks/results --sheet docs/contact_sheet.png
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import click
from PIL import Image
from tqdm import tqdm

from ipa.benchmarks.command import Command
from ipa.benchmarks.quality_sheets import Row, contact_sheet, save_sheet
from ipa.engines.bundle import hash_file
from ipa.engines.errors import IpaError
from ipa.engines.registry import backend_named
from ipa.runtime import Pipeline
from ipa.runtime.demo import demo_bundle
from ipa.trainer.demo.evaluate import PAIRS, Pair, Scores, held_out_pairs, score
from ipa.trainer.demo.judge import SHIPPED, load_judge
from ipa.trainer.files import atomic_path

SCALES = (0.0, 0.5, 1.0)
SHEET_PAIRS = 8
COUNT = click.IntRange(min=1)


def generate(pipe: Pipeline, pairs: Sequence[Pair], scale: float, steps: int, guidance: float) -> list[Image.Image]:
    """One picture per pair, seeded by its number."""
    return [
        pipe(
            prompt=pair.prompt,
            image=pair.reference,
            ip_adapter_scale=scale,
            num_inference_steps=steps,
            guidance_scale=guidance,
            scheduler="ddim",
            seed=number,
        )[0]
        for number, pair in enumerate(tqdm(pairs, desc=f"scale {scale}", unit="image", disable=None))
    ]


def table(scores: dict[str, Scores]) -> str:
    """Rates as a Markdown table."""
    names = ["foreground", "background", "both", "texture", "shape", "reference_shape"]
    lines = ["| scale | " + " | ".join(names).replace("_", " ") + " |", "|---" * (len(names) + 1) + "|"]
    for scale, rates in scores.items():
        cells = " | ".join(f"{getattr(rates, name):.0%}" for name in names)
        lines.append(f"| {scale} | {cells} |")
    return "\n".join(lines)


@click.command("demo_quality", cls=Command)
@click.option("--bundle", type=click.Path(path_type=Path), default=None, help="Default: the demo bundle.")
@click.option("--steps", type=COUNT, default=25, show_default=True, help="DDIM steps.")
@click.option("--guidance-scale", type=float, default=None, help="Default: the bundle's.")
@click.option("--engine", default="onnxruntime", show_default=True, help="Back-end that draws.")
@click.option("--pairs", "count", type=COUNT, default=PAIRS, show_default=True, help="How many held-out pairs.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("out"), help="Folder for demo_quality.json.")
@click.option("--sheet", type=click.Path(path_type=Path), default=None, help="Write a contact sheet here.")
def main(
    bundle: Path | None,
    steps: int,
    guidance_scale: float | None,
    engine: str,
    count: int,
    output: Path,
    sheet: Path | None,
) -> None:
    """Measure the demo model and print the rates by adapter scale."""
    pairs = held_out_pairs(count)
    judge = load_judge(SHIPPED)
    scores, pictures = {}, {}
    with Pipeline.open(bundle or demo_bundle(), engine=engine) as pipe:
        guidance = pipe.manifest.defaults.guidance_scale if guidance_scale is None else guidance_scale
        for scale in SCALES:
            images = generate(pipe, pairs, scale, steps, guidance)
            pictures[f"scale {scale}"] = images
            scores[str(scale)] = score(images, pairs, judge)
        unet = hash_file(pipe.bundle.file(pipe.manifest.components["unet"].files[-1]))
    scores["real references"] = score([pair.reference for pair in pairs], pairs, judge)
    click.echo(table(scores))
    record = {
        "command": "python -m ipa.benchmarks.demo_quality",
        "pairs": len(pairs),
        "steps": steps,
        "scheduler": "ddim",
        "guidance_scale": guidance,
        "engine": pipe.engine,
        "unet_weights_sha256": unet,
        "versions": {name: version(name) for name in ("ipa-runtime", "numpy", "torch")}
        | {pipe.engine: backend_named(pipe.engine).version},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "rates": {scale: asdict(rates) for scale, rates in scores.items()},
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        with atomic_path(output / "demo_quality.json") as partial:
            partial.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        if sheet is not None:
            rows = [Row(pair.prompt, pair.reference) for pair in pairs[:SHEET_PAIRS]]
            save_sheet(contact_sheet(rows, {name: images[:SHEET_PAIRS] for name, images in pictures.items()}), sheet)
    except OSError as error:  # a full disk, an --output that is a file
        raise IpaError(f"{error.filename or output}: {error.strerror or error}; name another place") from error


if __name__ == "__main__":
    main()
