"""What an image prompt costs a step: with against without, for graphs of every design."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ipa.benchmarks.contender import Setting
from ipa.benchmarks.entries import plain_engine, torch_entry
from ipa.benchmarks.full_size import PLUS_TOKENS, TOKENS
from ipa.benchmarks.intervals import bootstrap
from ipa.benchmarks.models import Models, write_merged, write_plus_adapter
from ipa.benchmarks.pairing import first_blocks, measure_closely, second_seconds
from ipa.benchmarks.plain_graph import DESCRIPTION, graph_for, write_hoisted_graph, write_ordinary_graph
from ipa.benchmarks.processes import ContenderError, ContenderProcess, Entry
from ipa.benchmarks.progress import Progress
from ipa.benchmarks.records import NotMeasured, Overhead
from ipa.engines.bundle import Bundle
from ipa.export.winograd import guidance_pair_sizes

_OURS = "ipa.benchmarks.our_contenders"


@dataclass(frozen=True)
class Pair:
    """One row: the same step with and without."""

    name: str
    contender: str
    tokens: int
    with_image: Entry
    without: Entry


def pairs(models: Models, setting: Setting, engines: Sequence[str], device: str) -> Iterator[Pair]:
    """The rows that a preset has: hoisted on each of our back-ends, in the graph on onnxruntime, diffusers' own.

    What is missing on disk is written first.

    Args:
        engines: of ours, those that run here and need nothing built: there are no built engines of such graphs.
    """
    assert models.folder is not None and models.base is not None
    base, folder = models.base, models.folder
    manifest = Bundle.open(models.bundle, verify=False).manifest
    unet, defaults, downscale = manifest.components["unet"].spec, manifest.defaults, manifest.vae.downscale
    dtype = unet.inputs[0].dtype
    free = {"batch": setting.unet_batch}
    free |= {"latent_height": setting.height // downscale, "latent_width": setting.width // downscale}
    hoisted, ordinary = folder / f"hoisted-{dtype}", folder / f"ordinary-{dtype}"
    write_hoisted_graph(base, hoisted, unet, guidance_pair_sizes(defaults.height, defaults.width, downscale))

    def without(graph: Path, engine: str) -> Entry:
        options = {"file": str(graph_for(graph, engine)), "description": str(graph / DESCRIPTION)}
        return Entry("without", "", f"{_OURS}:open_graph", {**options, "engine": engine, "free": free})

    for engine in engines:
        for tokens in (TOKENS, PLUS_TOKENS):
            options = {"bundle": str(models.bundle), "engine": engine, "free": {**free, "tokens": tokens}}
            with_image = Entry("hoisted", "", f"{_OURS}:open_unet", options)
            yield Pair(f"hoisted, {tokens} tokens", engine, tokens, with_image, without(hoisted, engine))
    plain = plain_engine(device)
    if plain in engines and models.merged is not None:
        write_ordinary_graph(base, ordinary, dtype)
        for tokens, file in ((TOKENS, models.merged), (PLUS_TOKENS, models.merged.with_name("plus.onnx"))):
            if not file.exists():
                write_merged(models, write_plus_adapter(models), file, dtype)
            options = {"file": str(file), "engine": plain, "free": free}
            merged = Entry("in the graph", "", f"{_OURS}:open_merged", options)
            yield Pair(f"in the graph, {tokens} tokens", "onnxruntime-plain", tokens, merged, without(ordinary, plain))
    one = replace(setting, block_steps=1)
    eager = torch_entry("torch-eager", models, one, device)
    yield Pair(
        f"diffusers, {TOKENS} tokens",
        "torch-eager",
        TOKENS,
        eager,
        torch_entry("torch-eager", models, replace(one, has_image=False), device),
    )


def measure_overhead(
    rows: Iterator[Pair], rounds: int, progress: Progress, found: list[Overhead], missing: list[NotMeasured]
) -> None:
    """Time each row's two sides in rounds A B B A.

    Args:
        rounds: of each row; more where the cost is not known to 1 % by then, see `measure_closely`.
        found, missing: are added to row by row, so that an interruption leaves what was measured.
    """
    for row in rows:
        name = f"{row.name} ({row.contender})"
        progress(f"cost of the image prompt, {name}", 0)
        try:
            with ContenderProcess(row.with_image) as with_image, ContenderProcess(row.without) as without:
                with_image.warm()
                without.warm()
                quads = measure_closely(with_image.block, without.block, rounds, lambda: progress(None, 1))
        except ContenderError as error:
            missing.append(NotMeasured(f"cost of the image prompt: {name}", str(error)))
            continue
        with_seconds, without_seconds = bootstrap(first_blocks(quads)).value, second_seconds(quads).value
        against = bootstrap([quad.ratio for quad in quads])
        found.append(Overhead(row.name, row.contender, row.tokens, with_seconds, without_seconds, against))
