"""From a request to pictures: `Pipeline.run` shows every stage in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ipa.engines.bundle import Bundle
from ipa.engines.closing import Closing
from ipa.engines.engine import Engine
from ipa.engines.errors import EngineError
from ipa.runtime.batch import batch_key, check_batch
from ipa.runtime.beginning import Beginner, Beginning
from ipa.runtime.conditioning import guidance_batch
from ipa.runtime.controls import ControlInputs, ControlledRun
from ipa.runtime.denoise import Guidance, Step, denoise
from ipa.runtime.image_prompt import ImagePrompt
from ipa.runtime.image_slots import Slot, SlotInputs, image_slots, opened, prompt_features
from ipa.runtime.images import to_images
from ipa.runtime.kept import Kept
from ipa.runtime.opened_engines import Engines, components_of
from ipa.runtime.preparation import Preparation
from ipa.runtime.request import Request
from ipa.runtime.run import Run
from ipa.runtime.text import Text

Array = NDArray[Any]
Callback = Callable[[Step], None]


@dataclass(frozen=True)
class Result:
    """What came out of a request.

    Attributes:
        images: RGB pictures.
        request: as it was carried out: defaults filled in, seed drawn.
        warnings: what the user should know, such as a prompt that was cut.
        unet_calls: of the denoising loop.
        seconds: wall-clock time by stage, in the order they ran; `load` is opening and compiling engines.
    """

    images: list[Image.Image]
    request: Request
    warnings: list[str]
    unet_calls: int
    seconds: dict[str, float]

    @property
    def steps_per_second(self) -> float:
        """Rate of the denoising loop, in calls of the UNet."""
        return self.unet_calls / self.seconds["denoise"]


class Pipeline(Closing):
    """An opened bundle that makes pictures. Engines open when first needed and stay open until `close`."""

    def __init__(
        self, bundle: Bundle, engine: str = "auto", keep_engines: bool = True, is_flexible: bool = False
    ) -> None:
        self.bundle = bundle
        self.keep_engines = keep_engines
        self.manifest = bundle.manifest
        self._engines = Engines(bundle, engine, is_flexible)
        self.choice = self._engines.choice
        self.engine = self.choice.name
        self._kept = Kept()
        self._text = Text(bundle, self._engines, self._kept)
        self._preparation = Preparation(bundle)

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        engine: str = "auto",
        verify: bool = True,
        keep_engines: bool = True,
        trust_engines: Path | None = None,
        is_flexible: bool = False,
    ) -> Pipeline:
        """Open a bundle's folder.

        Args:
            path: the folder that `ipa-export onnx` wrote.
            engine: back-end, one of `ipa.engines.registry.ENGINE_NAMES`.
            verify: check the sha256 of every file first.
            keep_engines: keep them for the next request. Without, each closes after its stage: one request takes
                no more memory than its largest stage does.
            trust_engines: folder of engine plans to use in place of the user's own cache. A plan is native code: name
                only a folder that you would run programs from.
            is_flexible: whether adapters and ControlNets that the back-end cannot run, such as those that no engine was
                built for, may run in another one; with `auto` they may in any case.
        Raises:
            BundleError: the bundle is missing, damaged or of a newer format.
            EngineError: the back-end is unknown, not installed or cannot run here.
            RequestError: `trust_engines` with a back-end that has no plans.
        """
        return cls(Bundle.open(Path(path), verify, trust_engines), engine, keep_engines, is_flexible)

    def close(self) -> None:
        """Close every engine."""
        self._engines.close()

    def __call__(self, prompt: str = "", *, callback: Callback | None = None, **fields: Any) -> list[Image.Image]:
        """Pictures for a prompt and an image; the keywords are the fields of `Request`.

        Raises:
            RequestError: a field does not fit.
        """
        return self.run(Request(prompt=prompt, **fields), callback).images

    def run(self, request: Request, callback: Callback | None = None) -> Result:
        """Carry out a request.

        Args:
            request: what to make.
            callback: called after each step of the denoising loop.
        Raises:
            RequestError: the image cannot be read, or the bundle has no such adapter.
            EngineError: an engine cannot be opened or failed.
        """
        return self.run_batch([request], callback)[0]

    def run_batch(self, requests: Sequence[Request], callback: Callback | None = None) -> list[Result]:
        """Carry out several requests with one call of the UNet a step.

        Args:
            requests: what to make; all with the same `batch_key`.
            callback: called after each step of the denoising loop.
        Returns:
            A result for each request; the seconds are those of the whole batch.
        Raises:
            RequestError: as `run`, or the requests differ in what a batch shares.
            EngineError: as `run`.
        """
        runs = [self._preparation.run(request) for request in requests]
        seconds, loaded = {"load": 0.0}, self._engines.load_seconds
        if self.keep_engines:  # all at once: what cannot be opened is known before the work starts
            self.load([run.request for run in runs])
        with self._stage("text", seconds):
            runs = [run.with_text(*self._text.encode(run.request)) for run in runs]
        with self._stage("image", seconds):
            runs = [run.with_slots(self._slots(run)) for run in runs]
        with self._stage("beginning", seconds):
            begin = self._begin(runs)
        with self._stage("denoise", seconds):
            for step in self._denoise(runs, begin):
                if callback is not None:
                    callback(step)
        with self._stage("vae_decoder", seconds):
            images = iter(self._decode(step.latents))
        seconds["load"] = self._engines.load_seconds - loaded
        return [
            Result(list(islice(images, run.count)), run.request, list(run.warnings), step.count, seconds)
            for run in runs
        ]

    def batch_key(self, request: Request) -> Hashable:
        """What requests must share to be carried out in one batch.

        Raises:
            RequestError: the request does not fit the bundle.
        """
        return batch_key(self._preparation.resolved(request), self.bundle)

    def load(self, requests: Sequence[Request] = ()) -> None:
        """Open the engines that resolved requests need, and those that any request does.

        Raises:
            EngineError: one cannot be opened.
        """
        for name in components_of(self._text.components, requests):
            self._engines(name)

    def component(self, name: str) -> Engine:
        """The opened engine of a component of the spec table, `ip_adapter/NAME` or `controlnet/NAME`.

        Raises:
            BundleError, RequestError: the bundle has no such component, adapter or ControlNet.
            EngineError: it cannot be opened.
        """
        return self._engines(name)

    def models(self, request: Request) -> dict[str, str]:
        """sha256 of everything of the bundle that decides a request's pictures, by component or part.

        Raises:
            RequestError: the request does not fit the bundle.
        """
        request = self._preparation.resolved(request)
        graphs = {name: self.bundle.graph(name).sha256 for name in components_of(self._text.components, [request])}
        tokenizers = {f"tokenizer {index}": file.sha256 for index, file in enumerate(self.manifest.tokenizers)}
        return {**graphs, **tokenizers, "scheduler": self.manifest.scheduler.sha256}

    def steps(self, request: Request) -> Iterator[Step]:
        """The denoising loop alone, as a generator: the last step's latents are the final ones."""
        run = self._preparation.run(request)
        run = run.with_text(*self._text.encode(run.request))
        runs = [run.with_slots(self._slots(run))]
        return self._denoise(runs, self._begin(runs))

    def image_embeds(self, prompt: ImagePrompt) -> Array:
        """The features of a prompt's images, (2, images, ...), negative half first; `prompt.adapter` reads them.

        Raises:
            RequestError: an image cannot be read.
            BundleError: there is no such adapter.
        """
        return prompt_features(opened(prompt, self.bundle), self.bundle, self._engines, self._kept)

    @contextmanager
    def _stage(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        """Time a stage, without what loading engines took; its engines close if they are not kept."""
        start, loaded = time.perf_counter(), self._engines.load_seconds
        yield
        seconds[name] = time.perf_counter() - start - (self._engines.load_seconds - loaded)
        if not self.keep_engines:
            self.close()

    def _controlled(self, run: Run) -> ControlledRun:
        """What ControlNets take of a request; its text is kept since it was encoded."""
        request = run.request
        assert request.height and request.width
        text = self._text.for_controls(request) if run.controls else {}
        return ControlledRun(run.controls, text, run.count, request.height, request.width)

    def _slots(self, run: Run) -> list[Slot]:
        """What the UNet's image slots show."""
        assert run.request.height and run.request.width
        return image_slots(run.prompts, self.bundle, self._engines, self._kept, run.request.height, run.request.width)

    def _begin(self, runs: Sequence[Run]) -> Beginning:
        """What the loop starts from."""
        check_batch([run.request for run in runs], self.bundle)
        vae, shape = self.manifest.vae, self._preparation.latent_shape(runs[0].request)
        beginner = Beginner(
            lambda: self._engines("vae_encoder"), vae.scaling_factor, vae.downscale, self._preparation.is_inpainting
        )
        return Beginning.joined(
            [beginner.begin(run.request, run.schedule, shape, run.init_image, run.mask_image) for run in runs]
        )

    def _denoise(self, runs: Sequence[Run], begin: Beginning) -> Iterator[Step]:
        request, schedule, unet = runs[0].request, runs[0].schedule, self._engines("unet")
        size = self._preparation.latent_shape(request)[1:]
        counts, has_guidance = [run.count for run in runs], request.has_guidance
        names = runs[0].text
        text = {name: guidance_batch([run.text[name] for run in runs], counts, has_guidance) for name in names}
        for array in text.values():
            array.flags.writeable = False  # so an engine may keep its copy over the steps
        slots = [run.slots for run in runs]
        images = SlotInputs(slots, counts, unet.spec, self.manifest.kv_layout, size, has_guidance)
        controlled = [self._controlled(run) for run in runs]
        controls = ControlInputs(
            controlled, self.bundle, self._engines, unet.spec, size, has_guidance, request.guess_mode
        )

        def conditions(index: int, sample: NDArray[np.float32], timestep: float) -> Mapping[str, Array]:
            count = len(schedule.timesteps)
            return {**text, **images.at(index, count), **controls.at(index, count, sample, timestep)}

        guidance = Guidance(request.guidance_scale or 1.0, request.guidance_rescale) if has_guidance else None
        return denoise(unet, schedule, begin, conditions, guidance)

    def _decode(self, latents: NDArray[np.float32]) -> list[Image.Image]:
        """One picture at a time: the decoder's memory grows with the batch, its speed does not.

        Raises:
            EngineError: a picture is of one value alone, which nothing that works decodes to.
        """
        decoder = self._engines("vae_decoder")
        unscaled = (latents / np.float32(self.manifest.vae.scaling_factor)).astype(decoder.spec.inputs[0].dtype)
        images = []
        for one in unscaled:
            image = decoder(latents=one[None])["image"].astype(np.float32)
            if image.min() == image.max():
                raise EngineError(
                    f"vae_decoder: every value of the picture is {image.flat[0]:g}, so an engine is broken; "
                    "`ipa-export validate` finds which, another `--engine` may do"
                )
            images += to_images(image)
        return images
