"""Proof that a bundle's graphs compute what the PyTorch models do, in one of the back-ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ipa.engines.bundle import Bundle, hash_file
from ipa.engines.engine import Array, Engine
from ipa.engines.errors import EngineError
from ipa.engines.registry import open_engine
from ipa.engines.spec import ComponentSpec, ImageSlots, axis_size, residuals_of
from ipa.engines.tensorrt_library import MODULES
from ipa.export.adapters import AdapterFile, AdapterWeights, read_adapter
from ipa.export.cases import SIZES, Size, cases, free_axes, step_inputs
from ipa.export.chain import Chain
from ipa.export.changes import BaseChanges, check_source, repeated
from ipa.export.checks import TOLERANCES, Check, agreement, change, failure, median, not_compared, picture, worst
from ipa.export.controlnets import ControlNet, ControlNetSource, read_controlnets
from ipa.export.dimensions import manifest_dimensions
from ipa.export.graphs import component_modules
from ipa.export.oracle import DiffusersControlNet, DiffusersStep
from ipa.export.pipeline import BasePipeline
from ipa.export.progress import Progress, silent
from ipa.export.single_file import is_checkpoint
from ipa.export.validation_record import REFERENCE_ENGINE
from ipa.export.whole_run import LARGEST, WholeRuns, reference_scheduler

_SCALES = (1.0, 0.6, 1.3)


class Validator:
    """Compares one bundle with the models it was made of."""

    def __init__(
        self,
        root: Path,
        base: str,
        image_encoder: str | None,
        adapters: Sequence[AdapterFile],
        engine: str = REFERENCE_ENGINE,
        changes: BaseChanges | None = None,
        controlnets: Sequence[ControlNetSource] = (),
    ) -> None:
        """Open the bundle and read the adapter files.

        Args:
            engine: back-end to compare, one of `ipa.engines.registry.ENGINE_NAMES`.
            changes: the files that the bundle says it was made with.
            controlnets: that are in the bundle.
        Raises:
            IpaError: the bundle is damaged, or base model, adapters or ControlNets are not the kind of the bundle's.
        """
        self.bundle = Bundle.open(root)
        self.engine = self.bundle.resolve_engine(engine).name
        manifest, given = self.bundle.manifest, changes or BaseChanges()
        check_source(manifest, "checkpoint", "--base", base if is_checkpoint(base) else None)
        check_source(manifest, "vae", "--vae", given.vae)
        self.base = BasePipeline(base, image_encoder, repeated(manifest, given))
        reference_scheduler(self.base)  # refused before the minutes of work, if at all
        dimensions = manifest_dimensions(manifest)
        self._adapters = {
            _bundle_name(self.bundle, file): read_adapter(file.path, manifest.kv_layout, dimensions)
            for file in adapters
        }
        for source in controlnets:
            self.bundle.controlnet(source.name)
        self._controlnets = read_controlnets(controlnets, self.base)
        self._sizes, self._largest = self._usable_sizes()

    def _usable_sizes(self) -> tuple[Sequence[Size], int | None]:
        """Sizes to compare at, and the side of whole runs: engines that were built for some sizes take no others."""
        if self.engine not in MODULES:
            return SIZES, LARGEST
        manifest = self.bundle.manifest
        height, width = (size // manifest.vae.downscale for size in (manifest.defaults.height, manifest.defaults.width))
        from ipa.engines.tensorrt_engine import TensorRtEngine  # needs NVIDIA's bindings

        with TensorRtEngine(self.bundle.graph("unet"), self.engine) as unet:
            fitting = [size for size in SIZES if unet.accepts(_shapes(unet.spec, size))]
            side = LARGEST if unet.accepts(_shapes(unet.spec, (2, 1, LARGEST, LARGEST))) else None
        return fitting or [(2, 4, height, width)], side

    def run(self, progress: Progress = silent) -> Iterator[Check]:
        """All checks: every component, the whole step, whole runs; then what was not named and so is not compared."""
        graphs = self.bundle.manifest.graphs()
        given = {f"ip_adapter/{name}" for name in self._adapters}
        given |= {f"controlnet/{control.name}" for control in self._controlnets}
        skipped = graphs.keys() - self.bundle.manifest.components.keys() - given
        total = len(graphs) - len(skipped) + len(("step", "run"))
        for name, module in self._modules():
            progress(name, total)
            with self.bundle.open_component(name, self.engine) as engine:
                yield self._component(name, engine, module)
            if self.engine in graphs[name].variants:  # the graph that all others run
                with open_engine(self.engine, self.bundle.graph(name)) as engine:
                    yield self._component(f"{name}, model.onnx", engine, module)
        for name, weights in self._adapters.items():
            progress(f"ip_adapter/{name}", total)
            with self.bundle.open_component(f"ip_adapter/{name}", self.engine) as engine:
                yield self._component(f"ip_adapter/{name}", engine, weights.module())
        progress("step", total)
        with Chain(self.bundle, self.engine) as chain:
            yield from self._steps(chain)
            progress("run", total)
            yield from self._runs(chain)
        for name in graphs:
            if name in skipped:
                option, _, part = name.removeprefix("ip_").partition("/")
                yield not_compared(name, f"name it with --{option} {part}=...")

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        """What the graphs are compared with, one part loaded at a time."""
        unet = self.bundle.manifest.components["unet"].spec
        yield from component_modules(self.base, ImageSlots.of(unet), residuals_of(unet))
        for control in self._controlnets:
            yield f"controlnet/{control.name}", DiffusersControlNet(control.load(), control.spec)

    def _tolerance(self, engine: Engine) -> float:
        """What the coarser of stored weights and arithmetic allows."""
        return max(TOLERANCES[engine.spec.outputs[0].dtype], TOLERANCES[engine.precision])

    def _component(self, name: str, engine: Engine, module: nn.Module) -> Check:
        module.eval()
        checks, tolerance = [], self._tolerance(engine)
        vocabulary = int(self.base.text_configs.get(name, self.base.text_config)["vocab_size"])
        for case, inputs in cases(engine.spec, self.bundle.manifest.vae.downscale, vocabulary, self._sizes):
            with torch.no_grad():
                result = module(*(_tensor(inputs[tensor.name]) for tensor in engine.spec.inputs))
            outputs = result if isinstance(result, tuple) else (result,)
            names = [tensor.name for tensor in engine.spec.outputs]
            expected = {output: value.numpy() for output, value in zip(names, outputs, strict=True)}
            try:
                found = engine(**inputs)
                checks.append(
                    agreement(name, case, found, expected, tolerance, is_picture=name.startswith("vae_decoder"))
                )
            except EngineError as error:
                return failure(name, f"{case}: {error}", tolerance)
        return worst(checks)

    def _steps(self, chain: Chain) -> Iterator[Check]:
        tolerance = self._tolerance(chain.unet)
        try:
            base_model = DiffusersStep(self.base.load_unet(), None)
            pairs = [
                agreement("step, no adapter", case, {"": chain(inputs)}, {"": base_model(inputs, 0.0)}, tolerance)
                for case, inputs in step_inputs(self.bundle.manifest, self._sizes)
            ]
            yield worst(pairs)
        except EngineError as error:
            yield failure("step, no adapter", str(error), tolerance)
            return
        for name, weights in self._adapters.items():
            with self.bundle.open_component(f"ip_adapter/{name}", self.engine) as adapter:
                try:
                    yield from self._adapter_steps(name, weights, chain, adapter)
                except EngineError as error:
                    yield failure(f"step, {name}", str(error), tolerance)
        for control in self._controlnets:
            with self.bundle.open_component(f"controlnet/{control.name}", self.engine) as controlnet:
                try:
                    yield from self._control_steps(control, base_model, chain, controlnet)
                except EngineError as error:
                    yield failure(f"step, controlnet/{control.name}", str(error), tolerance)

    def _control_steps(
        self, control: ControlNet, base_model: DiffusersStep, chain: Chain, controlnet: Engine
    ) -> Iterator[Check]:
        name, tolerance = f"step, controlnet/{control.name}", self._tolerance(chain.unet)
        model = DiffusersControlNet(control.load(), control.spec)
        checks = []
        for case, inputs in step_inputs(self.bundle.manifest, self._sizes):
            for scale in _SCALES:
                found = chain(inputs, control=(controlnet, scale))
                expected = base_model(inputs, 0.0, (model, scale))
                checks.append(agreement(name, f"{case}, scale {scale}", {"": found}, {"": expected}, tolerance))
        yield (largest := worst(checks))
        _, inputs = next(step_inputs(self.bundle.manifest, self._sizes))
        output, other = chain(inputs, control=(controlnet, 1.0)), chain(inputs)
        yield change(f"{name}, moves with scale", output, other, largest.relative_error)

    def _adapter_steps(self, name: str, weights: AdapterWeights, chain: Chain, adapter: Engine) -> Iterator[Check]:
        tolerance = self._tolerance(chain.unet)
        model = DiffusersStep(self.base.load_unet(), weights)
        checks, zero_scale = [], []
        for case, inputs in step_inputs(self.bundle.manifest, self._sizes):
            without = model(inputs, 0.0)
            zero_scale.append(
                agreement(f"step, {name}, scale 0", case, {"": chain(inputs, adapter, 0.0)}, {"": without}, tolerance)
            )
            for scale in _SCALES:
                found = chain(inputs, adapter, scale)
                checks.append(
                    agreement(
                        f"step, {name}",
                        f"{case}, scale {scale}",
                        {"": found},
                        {"": model(inputs, scale)},
                        tolerance,
                    )
                )
        yield (largest := worst(checks))
        yield worst(zero_scale)
        _, inputs = next(step_inputs(self.bundle.manifest, self._sizes))
        output = chain(inputs, adapter, 1.0)
        other = {**inputs, weights.feature: -inputs[weights.feature]}
        yield change(f"step, {name}, moves with image", output, chain(other, adapter, 1.0), largest.relative_error)
        yield change(f"step, {name}, moves with scale", output, chain(inputs, adapter, 0.0), largest.relative_error)

    def _runs(self, chain: Chain) -> Iterator[Check]:
        runs = WholeRuns(self.bundle.manifest, self.base, self._largest)
        with self.bundle.open_component("vae_decoder", self.engine) as decoder:
            yield _run(runs, "run, no adapter", None, chain, decoder)
            for name, weights in self._adapters.items():
                with self.bundle.open_component(f"ip_adapter/{name}", self.engine) as adapter:
                    yield _run(runs, f"run, {name}", weights, chain, decoder, adapter)


def _run(
    runs: WholeRuns,
    name: str,
    weights: AdapterWeights | None,
    chain: Chain,
    decoder: Engine,
    adapter: Engine | None = None,
) -> Check:
    references = runs.references(weights)
    try:
        pictures = runs.with_engines(lambda inputs: chain(inputs, adapter, 1.0), decoder)
    except EngineError as error:
        return failure(name, str(error), 0.0)
    return median(
        [
            picture(name, runs.case, found, expected, disturbed)
            for found, (expected, disturbed) in zip(pictures, references, strict=True)
        ]
    )


def _shapes(spec: ComponentSpec, size: Size) -> dict[str, tuple[int, ...]]:
    """Shapes of the UNet's inputs."""
    axes = free_axes(size, 1)
    return {tensor.name: tuple(axis_size(axis, axes) for axis in tensor.axes) for tensor in spec.inputs}


def _tensor(array: Array) -> torch.Tensor:
    """The reference computes in float32 on the very values that the engine gets."""
    return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float16 else array)


def _bundle_name(bundle: Bundle, file: AdapterFile) -> str:
    """Which of the bundle's adapters a file is: by name, else by content.

    Raises:
        IpaError: none of them.
    """
    adapters = bundle.manifest.adapters
    if file.name not in adapters and file.path.is_file():
        digest = hash_file(file.path)
        for name, adapter in adapters.items():
            if adapter.source_sha256 == digest:
                return name
    bundle.adapter(file.name)
    return file.name
