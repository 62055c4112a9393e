"""From a request to pictures: `Pipeline.run` shows every stage in order."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ipa.engines.bundle import Bundle
from ipa.engines.closing import Closing
from ipa.engines.engine import Engine
from ipa.engines.errors import BundleError, RequestError
from ipa.engines.tensorrt_library import MODULES
from ipa.runtime.beginning import Beginner, Beginning
from ipa.runtime.conditioning import guidance_batch
from ipa.runtime.controls import ControlInputs, ControlledRun, opened_controls, resolved_controls
from ipa.runtime.denoise import Guidance, Step, denoise
from ipa.runtime.image_prompt import ImagePrompt
from ipa.runtime.image_slots import Slot, SlotInputs, check_slots, image_slots, opened, prompt_features
from ipa.runtime.images import open_image, to_images
from ipa.runtime.kept import Kept
from ipa.runtime.request import Request
from ipa.runtime.run import Run
from ipa.runtime.schedulers import Schedule, create_scheduler
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

    def __init__(self, bundle: Bundle, engine: str = "auto", keep_engines: bool = True) -> None:
        self.bundle = bundle
        self.keep_engines = keep_engines
        self.manifest = bundle.manifest
        self.choice = bundle.resolve_engine(engine)
        self.engine = self.choice.name
        self._asked = engine
        if bundle.plans is not None and self.engine not in MODULES:
            raise RequestError(
                f"--trust-engines {bundle.plans} is for --engine {' or '.join(MODULES)}, this is {self.choice}"
            )
        self._engines: dict[str, Engine] = {}
        self._kept = Kept()
        self._closed_load_seconds = 0.0
        self._text = Text(bundle, self._engine, self._kept)
        self._scheduler_config = _read_json(bundle.file(self.manifest.scheduler))

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        engine: str = "auto",
        verify: bool = True,
        keep_engines: bool = True,
        trust_engines: Path | None = None,
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
        Raises:
            BundleError: the bundle is missing, damaged or of a newer format.
            EngineError: the back-end is unknown, not installed or cannot run here.
            RequestError: `trust_engines` with a back-end that has no plans.
        """
        return cls(Bundle.open(Path(path), verify, trust_engines), engine, keep_engines)

    def close(self) -> None:
        """Close every engine."""
        while self._engines:
            _, engine = self._engines.popitem()
            self._closed_load_seconds += engine.load_seconds
            engine.close()

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
        runs = [self._prepared(request) for request in requests]
        seconds, loaded = {"load": 0.0}, self._load_seconds()
        if self.keep_engines:  # all at once: what cannot be opened is known before the work starts
            self._load([run.request for run in runs])
        with self._stage("text", seconds):
            runs = [run.with_text(*self._text.encode(run.request)) for run in runs]
        with self._stage("image", seconds):
            runs = [run.with_slots(self._slots(run)) for run in runs]
        with self._stage("denoise", seconds):
            for step in self._denoise(runs):
                if callback is not None:
                    callback(step)
        with self._stage("vae_decoder", seconds):
            images = iter(self._decode(step.latents))
        seconds["load"] = self._load_seconds() - loaded
        return [
            Result(list(islice(images, run.count)), run.request, list(run.warnings), step.count, seconds)
            for run in runs
        ]

    def batch_key(self, request: Request) -> Hashable:
        """What requests must share to be carried out in one batch.

        Raises:
            RequestError: the request does not fit the bundle.
        """
        init_image = None if request.init_image is None else open_image(request.init_image)
        return self._key(self._resolved(request.sized(init_image))[0])

    def steps(self, request: Request) -> Iterator[Step]:
        """The denoising loop alone, as a generator: the last step's latents are the final ones."""
        run = self._prepared(request)
        run = run.with_text(*self._text.encode(run.request))
        return self._denoise([run.with_slots(self._slots(run))])

    def image_embeds(self, prompt: ImagePrompt) -> Array:
        """The features of a prompt's images, (2, images, ...), negative half first; `prompt.adapter` reads them.

        Raises:
            RequestError: an image cannot be read.
            BundleError: there is no such adapter.
        """
        return prompt_features(opened(prompt, self.bundle), self.bundle, self._engine, self._kept)

    def _prepared(self, request: Request) -> Run:
        """The request checked, its pictures read."""
        init_image, mask_image = (
            None if picture is None else open_image(picture) for picture in (request.init_image, request.mask_image)
        )
        request, schedule = self._resolved(request.sized(init_image))
        prompts = tuple(opened(prompt, self.bundle) for prompt in request.all_image_prompts)
        return Run(request, schedule, prompts, init_image, mask_image, opened_controls(request.controls))

    def _key(self, request: Request) -> Hashable:
        tokens = [
            self.bundle.adapter(str(prompt.adapter)).tokens * (1 if prompt.masks else len(prompt.images))
            for prompt in request.all_image_prompts
            for _ in range(prompt.slots)
        ]
        guidance = request.guidance_scale, request.guidance_rescale
        numbers = (request.num_inference_steps, *guidance, request.height, request.width, request.eta)
        task = (request.strength, request.init_image is None, request.mask_image is None)
        embeds = tuple(str(prompt.embeds) for prompt in request.all_image_prompts)  # the number in it is not known yet
        controls = (request.guess_mode, *(control.name for control in request.controls))
        return (*numbers, request.scheduler, *task, *tokens, *embeds, controls)

    def _load(self, requests: Sequence[Request]) -> None:
        names = [*self._text.components, "unet", "vae_decoder"]
        prompts = [prompt for request in requests for prompt in request.all_image_prompts]
        names += ["image_encoder"] if any(prompt.images for prompt in prompts) else []
        names += {f"ip_adapter/{prompt.adapter}": None for prompt in prompts}
        names += {f"controlnet/{control.name}": None for request in requests for control in request.controls}
        names += ["vae_encoder"] if any(request.init_image is not None for request in requests) else []
        for name in names:
            self._engine(name)

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            self._engines[name] = self.bundle.open_component(name, self._engine_for(name))
        return self._engines[name]

    def _engine_for(self, name: str) -> str:
        """The back-end of a component: one beside the base model that no engine was built for runs where it can."""
        is_beside = name.startswith(("ip_adapter/", "controlnet/"))
        return "auto" if self._asked == "auto" and is_beside else self.engine

    def _load_seconds(self) -> float:
        """What opening and compiling engines has taken so far."""
        return self._closed_load_seconds + sum(engine.load_seconds for engine in self._engines.values())

    @contextmanager
    def _stage(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        """Time a stage, without what loading engines took; its engines close if they are not kept."""
        start, loaded = time.perf_counter(), self._load_seconds()
        yield
        seconds[name] = time.perf_counter() - start - (self._load_seconds() - loaded)
        if not self.keep_engines:
            self.close()

    def _resolved(self, request: Request) -> tuple[Request, Schedule]:
        """The request with nothing left open, and its run of the scheduler."""
        request = request.resolved(self.manifest)
        check_slots(request.all_image_prompts, self.bundle)
        request = replace(request, controls=resolved_controls(request.controls, self.bundle))
        self._check_task(request)
        scheduler = create_scheduler(request.scheduler, self._scheduler_config)
        assert request.num_inference_steps is not None
        if request.first_step == request.num_inference_steps:
            raise RequestError(
                f"strength {request.strength} of {request.num_inference_steps} steps leaves none: "
                "raise --strength or --steps"
            )
        schedule = scheduler.schedule(request.num_inference_steps, eta=request.eta, start=request.first_step)
        return replace(request, scheduler=scheduler.name), schedule

    def _check_task(self, request: Request) -> None:
        """Refuse what the UNet was not made for."""
        unet = self.manifest.components["unet"].spec
        if unet.inputs[0].axes[1] != unet.outputs[0].axes[1] and request.mask_image is None:
            raise RequestError(
                f"{self.bundle.root} holds an inpainting model, which fills a part of a picture: "
                "add --init-image and --mask-image"
            )

    def _controlled(self, run: Run) -> ControlledRun:
        """What ControlNets take of a request; its text is kept since it was encoded."""
        request = run.request
        assert request.height and request.width
        text = self._text.for_controls(request) if run.controls else {}
        return ControlledRun(run.controls, text, run.count, request.height, request.width)

    def _slots(self, run: Run) -> list[Slot]:
        """What the UNet's image slots show."""
        assert run.request.height and run.request.width
        return image_slots(run.prompts, self.bundle, self._engine, self._kept, run.request.height, run.request.width)

    def _denoise(self, runs: Sequence[Run]) -> Iterator[Step]:
        request, schedule = runs[0].request, runs[0].schedule
        if len({self._key(run.request) for run in runs}) > 1:
            raise RequestError(
                "requests of one batch must have equal steps, sizes, guidance, image prompts and ControlNets"
            )
        assert request.height and request.width
        unet, downscale = self._engine("unet"), self.manifest.vae.downscale
        channels = unet.spec.outputs[0].axes[1]
        shape = (int(channels), request.height // downscale, request.width // downscale)
        is_inpainting = unet.spec.inputs[0].axes[1] != channels
        vae = self.manifest.vae
        beginner = Beginner(lambda: self._engine("vae_encoder"), vae.scaling_factor, downscale, is_inpainting)
        begin = Beginning.joined(
            [beginner.begin(run.request, run.schedule, shape, run.init_image, run.mask_image) for run in runs]
        )
        counts, has_guidance = [run.count for run in runs], request.has_guidance
        names = runs[0].text
        text = {name: guidance_batch([run.text[name] for run in runs], counts, has_guidance) for name in names}
        for array in text.values():
            array.flags.writeable = False  # so an engine may keep its copy over the steps
        slots = [run.slots for run in runs]
        images = SlotInputs(slots, counts, unet.spec, self.manifest.kv_layout, shape[1:], has_guidance)
        controlled = [self._controlled(run) for run in runs]
        controls = ControlInputs(
            controlled, self.bundle, self._engine, unet.spec, shape[1:], has_guidance, request.guess_mode
        )

        def conditions(index: int, sample: NDArray[np.float32], timestep: float) -> Mapping[str, Array]:
            count = len(schedule.timesteps)
            return {**text, **images.at(index, count), **controls.at(index, count, sample, timestep)}

        guidance = Guidance(request.guidance_scale or 1.0, request.guidance_rescale) if has_guidance else None
        return denoise(unet, schedule, begin, conditions, guidance)

    def _decode(self, latents: NDArray[np.float32]) -> list[Image.Image]:
        """One picture at a time: the decoder's memory grows with the batch, its speed does not."""
        decoder = self._engine("vae_decoder")
        unscaled = (latents / np.float32(self.manifest.vae.scaling_factor)).astype(decoder.spec.inputs[0].dtype)
        return [to_images(decoder(latents=one[None])["image"].astype(np.float32))[0] for one in unscaled]


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise BundleError(f"{path} is not JSON ({error}); export the bundle again") from error
    if not isinstance(config, dict):
        raise BundleError(f"{path} is not a JSON object; export the bundle again")
    return config
