"""The models of a speed run: at full size with random weights, small, the demo's, or the user's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ipa.benchmarks.bundle_origin import torch_obstacle
from ipa.benchmarks.contender import INPAINT_CHANNELS
from ipa.benchmarks.full_size import FULL, FULL_XL, SMALL, Sizes, write_adapter, write_controlnet, write_pipeline
from ipa.engines.bundle import Bundle
from ipa.runtime.demo import demo_bundle
from ipa.trainer.files import atomic_path

PRESETS: dict[str, tuple[str, Sizes]] = {
    "sd15": ("Stable Diffusion 1.5 at full size, random weights", FULL),
    "sdxl": ("Stable Diffusion XL at full size, random weights", FULL_XL),
    "small": ("the structure of Stable Diffusion 1.5, small, random weights", SMALL),
}
DEMO = "demo"
ADAPTER = "ip-adapter"
CONTROLNET = "control"
OPSET = 18
COMPLETE = "complete.txt"  # written last


@dataclass(frozen=True)
class Models:
    """What the contenders open.

    Attributes:
        name, title: for the record and for people.
        bundle: for our side.
        base, adapter: for PyTorch: a pipeline folder and its IP-Adapter; `None`: there are none.
        image_encoder: the adapter's, where it is not the pipeline's.
        torch_obstacle: why PyTorch cannot take part although it has both; empty: it can.
        controlnet: ControlNet folder, where the task has one; `control` is its name in the bundle.
        merged: the ordinary graph with the adapter inside; `None`: there is none.
        folder: where more may be written, such as graphs for the cost of the image prompt; `None`: nowhere.
    """

    name: str
    title: str
    bundle: Path
    base: Path | None = None
    adapter: Path | None = None
    controlnet: Path | None = None
    control: str | None = None
    merged: Path | None = None
    folder: Path | None = None
    image_encoder: Path | None = None
    torch_obstacle: str = ""


def preset(name: str, folder: Path, task: str, dtype: str) -> Models:
    """Write one of `PRESETS` and its bundle into a folder, or find them there.

    Args:
        folder: for everything that is written; tens of gigabytes at full size.
        task: of `ipa.benchmarks.contender.TASKS`; inpainting has a UNet of 9 channels.
        dtype: of the bundle; `float16` is for GPUs.
    Raises:
        IpaError: something could not be written.
    """
    title, sizes = PRESETS[name]
    if task == "inpaint":
        sizes = replace(sizes, unet={**sizes.unet, "in_channels": INPAINT_CHANNELS})
    kind = {"inpaint": f"{name}-inpaint", "controlnet": f"{name}-controlnet"}.get(task, name)
    home = folder / kind
    base, adapter = home / "base", home / f"{ADAPTER}.safetensors"
    controlnet = home / "controlnet" if task == "controlnet" else None
    models_dtype = "float16" if name == "sdxl" else "float32"
    if not (home / COMPLETE).exists():
        write_pipeline(base, sizes=sizes, dtype=models_dtype)
        write_adapter(adapter, sizes=sizes, dtype=models_dtype)
        if controlnet is not None:
            write_controlnet(controlnet, sizes=sizes, dtype=models_dtype)
        (home / COMPLETE).write_text(f"{title}\n", "utf-8")
    bundle = home / f"bundle-{dtype}"
    # ControlNets have no place in the single graph; SDXL's would be a second 10 GB.
    merged = home / f"merged-{dtype}" / "step.onnx" if task == "variation" and name != "sdxl" else None
    if not bundle.exists():
        _export(base, adapter, controlnet, bundle, merged, dtype)
    return Models(name, title, bundle, base, adapter, controlnet, None, merged, home)


def users_own(
    bundle: Path, base: Path | None, image_encoder: Path | None, adapter: Path | None, controlnet: str | None
) -> Models:
    """The user's bundle, and what it was exported from for PyTorch's side, if it is given.

    Args:
        controlnet: `[NAME=]DIR`.
    Raises:
        IpaError: the ControlNet's name has other characters than letters, digits, `_` and `-`.
    """
    from ipa.export.controlnets import ControlNetSource

    manifest = Bundle.open(bundle, verify=False).manifest
    models = Models(
        bundle.name,
        f"{bundle.name} ({manifest.family})",
        bundle,
        base,
        adapter,
        image_encoder=image_encoder,
        torch_obstacle=torch_obstacle(manifest),
    )
    if controlnet is None:
        return models
    source = ControlNetSource.parse(controlnet)
    return replace(models, controlnet=Path(source.location), control=source.name)


def demo(folder: Path) -> Models:
    """The shipped demo model; what PyTorch and plain onnxruntime need of it is made from its bundle."""
    from ipa.benchmarks.demo_weights import restored_demo

    bundle = Bundle.open(demo_bundle())
    base, adapter = restored_demo(bundle, folder / DEMO)
    dtype = bundle.manifest.components["unet"].spec.inputs[0].dtype
    merged = base.with_name(f"merged-{dtype}") / "step.onnx"
    models = Models(DEMO, "the demo model", bundle.root, base, adapter, merged=merged)
    if not merged.exists():
        write_merged(models, adapter, merged, dtype)
    return models


def write_plus_adapter(models: Models) -> Path:
    """An adapter of the kind plus with 16 tokens, for a preset."""
    assert models.folder is not None
    file = models.folder / "ip-adapter-plus.safetensors"
    if not file.exists():
        with atomic_path(file) as partial:
            write_adapter(partial, sizes=PRESETS[models.name][1], is_plus=True)
    return file


def write_merged(models: Models, adapter: Path, file: Path, dtype: str) -> None:
    """The ordinary graph with an adapter inside."""
    from ipa.engines.spec import ONE_SLOT
    from ipa.export.adapters import read_adapter
    from ipa.export.dimensions import base_dimensions
    from ipa.export.graphs import component_modules, typed_graph
    from ipa.export.merged import MergedOptions, export_merged, staged_merged
    from ipa.export.pipeline import BasePipeline

    base = BasePipeline(str(models.base))
    dimensions, options = base_dimensions(base), MergedOptions(file)
    weights = read_adapter(adapter, base.kv_layout, dimensions)
    modules = {}
    for name, module in component_modules(base, ONE_SLOT, ()):
        if name in ("text_kv", "unet"):
            typed_graph(name, module, dimensions, dtype, base.family)  # makes the module of that dtype
            modules[name] = module
        if len(modules) == 2:
            break
    unet, text_kv = modules["unet"], modules["text_kv"]
    with staged_merged(options) as folder:
        export_merged(options, folder, unet, text_kv, file.stem, weights, dimensions, dtype, OPSET, base.family)


def _export(base: Path, adapter: Path, controlnet: Path | None, bundle: Path, merged: Path | None, dtype: str) -> None:
    from ipa.export.adapters import AdapterFile
    from ipa.export.build import ExportRequest, export_bundle
    from ipa.export.controlnets import ControlNetSource
    from ipa.export.merged import MergedOptions

    export_bundle(
        ExportRequest(
            str(base),
            bundle,
            adapters=(AdapterFile(ADAPTER, adapter),),
            dtype=dtype,
            force=True,
            merged=None if merged is None else MergedOptions(merged),
            controlnets=() if controlnet is None else (ControlNetSource(CONTROLNET, str(controlnet)),),
        )
    )
