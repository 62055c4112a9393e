"""From a request to pictures: `Pipeline.run` shows every stage in order."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ipa.engines.bundle import Bundle
from ipa.engines.closing import Closing
from ipa.engines.engine import Engine
from ipa.engines.errors import BundleError, RequestError
from ipa.engines.packed_kv import no_image_kv, scale_values
from ipa.engines.tensorrt_library import MODULES
from ipa.runtime.conditioning import guidance_batch, image_features
from ipa.runtime.denoise import Step, denoise
from ipa.runtime.images import open_image, preprocess, to_images
from ipa.runtime.noise import TorchGenerator
from ipa.runtime.request import Request
from ipa.runtime.schedulers import Schedule, create_scheduler
from ipa.runtime.tokenizer import Tokenizer

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
        self._closed_load_seconds = 0.0
        self._tokenizer = Tokenizer.open(bundle.file(self.manifest.tokenizer), self.manifest.text_tokens)
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
        request, schedule = self._resolved(request)
        image = None if request.image is None else open_image(request.image)
        seconds, loaded = {"load": 0.0}, self._load_seconds()
        if self.keep_engines:  # all at once: what cannot be opened is known before the work starts
            self._load(request)
        with self._stage("text", seconds):
            text_kv, warnings = self._text_kv(request)
        with self._stage("image", seconds):
            image_kv = self._image_kv(request, image)
        with self._stage("denoise", seconds):
            for step in self._denoise(request, schedule, text_kv, image_kv):
                if callback is not None:
                    callback(step)
        with self._stage("vae_decoder", seconds):
            images = self._decode(step.latents)
        seconds["load"] = self._load_seconds() - loaded
        return Result(images, request, warnings, step.count, seconds)

    def steps(self, request: Request) -> Iterator[Step]:
        """The denoising loop alone, as a generator: the last step's latents are the final ones."""
        request, schedule = self._resolved(request)
        image = None if request.image is None else open_image(request.image)
        text_kv, _ = self._text_kv(request)
        return self._denoise(request, schedule, text_kv, self._image_kv(request, image))

    def _load(self, request: Request) -> None:
        names = ["text_encoder", "text_kv", "unet", "vae_decoder"]
        if request.adapter is not None:
            names += ["image_encoder", f"ip_adapter/{request.adapter}"]
        for name in names:
            self._engine(name)

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            self._engines[name] = self.bundle.open_component(name, self._engine_for(name))
        return self._engines[name]

    def _engine_for(self, name: str) -> str:
        """The back-end of a component: an adapter that no engine was built for runs where `auto` can run it."""
        return "auto" if self._asked == "auto" and name.startswith("ip_adapter/") else self.engine

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
        scheduler = create_scheduler(request.scheduler, self._scheduler_config)
        assert request.num_inference_steps is not None
        schedule = scheduler.schedule(request.num_inference_steps, eta=request.eta)
        return replace(request, scheduler=scheduler.name), schedule

    def _text_kv(self, request: Request) -> tuple[Array, list[str]]:
        """Keys and values of negative and positive prompt, (2, text_tokens, kv), and warnings."""
        texts = {"negative prompt": request.negative_prompt, "prompt": request.prompt}
        encodings = {name: self._tokenizer.encode(text) for name, text in texts.items()}
        warnings = [
            f"the {name} is longer than {self.manifest.text_tokens - 2} tokens; this was cut off: {encoding.cut!r}"
            for name, encoding in encodings.items()
            if encoding.cut
        ]
        if request.negative_prompt and not request.has_guidance:
            warnings.append(f"the negative prompt has no effect at guidance scale {request.guidance_scale}")
        input_ids = np.stack([encoding.ids for encoding in encodings.values()])
        encoder_hidden_states = self._engine("text_encoder")(input_ids=input_ids)["encoder_hidden_states"]
        return self._engine("text_kv")(encoder_hidden_states=encoder_hidden_states)["text_kv"], warnings

    def _image_kv(self, request: Request, image: Image.Image | None) -> Array:
        """Scaled keys and values of negative and positive image prompt, (2, tokens, kv)."""
        layout = self.manifest.kv_layout
        if image is None or request.adapter is None or request.ip_adapter_scale is None:
            return no_image_kv(layout, self.manifest.components["unet"].dtype)
        record = self.bundle.adapter(request.adapter)
        pixel_values = preprocess([image], self.manifest.image_processor)
        halves = image_features(self._engine("image_encoder"), pixel_values, request.adapter, record)
        image_kv = self._engine(f"ip_adapter/{request.adapter}")(**{record.feature: halves})["image_kv"]
        return scale_values(image_kv, layout, request.ip_adapter_scale)

    def _denoise(self, request: Request, schedule: Schedule, text_kv: Array, image_kv: Array) -> Iterator[Step]:
        assert request.seed is not None and request.height and request.width and request.guidance_scale is not None
        unet = self._engine("unet")
        generator = TorchGenerator(request.seed)
        downscale = self.manifest.vae.downscale
        channels = unet.spec.outputs[0].axes[1]
        shape = (request.num_images, int(channels), request.height // downscale, request.width // downscale)
        chosen = slice(None) if request.only is None else slice(request.only, request.only + 1)

        def draw_noise() -> NDArray[np.float32]:
            return generator.randn(shape)[chosen]

        latents = draw_noise() * np.float32(schedule.init_noise_sigma)
        text_kv, image_kv = (guidance_batch(kv, len(latents), request.has_guidance) for kv in (text_kv, image_kv))
        for kv in (text_kv, image_kv):
            kv.flags.writeable = False  # so an engine may keep its copy over the steps
        return denoise(unet, schedule, latents, text_kv, image_kv, request.guidance_scale, draw_noise)

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
