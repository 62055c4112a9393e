"""Options of `ipa-bench speed`, checked before anything is made or timed."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ipa.benchmarks.bundle_origin import check_adapter
from ipa.benchmarks.contender import Setting
from ipa.benchmarks.diffusers_pipeline import image_encoder_folder
from ipa.benchmarks.entries import NAMES
from ipa.benchmarks.models import DEMO, PRESETS
from ipa.engines.bundle import Bundle
from ipa.engines.errors import IpaError, RequestError
from ipa.runtime.demo import demo_bundle
from ipa.runtime.pipeline import Pipeline

QUICK = (DEMO, "small")  # whose whole loop is one block
_SOURCES = ("base", "image_encoder", "adapter", "controlnet")
_CONFIGS = ("unet/config.json", "vae/config.json")  # what operations are counted from
_USUAL_SIZE = (512, 512)  # for the check of a request whose model is not there yet


@dataclass(frozen=True)
class SpeedOptions:
    """As `ipa-bench speed --help` has them; `names`: of contenders, `None` is all."""

    model: str
    output: Path
    folder: Path
    task: str = "variation"
    names: tuple[str, ...] | None = None
    resolution: str | None = None
    batch: int = 1
    steps: int = 25
    block_steps: int | None = None
    scheduler: str = "ddim"
    guidance_scale: float = 5.0
    pairs: int = 7
    base: Path | None = None
    image_encoder: Path | None = None
    adapter: Path | None = None
    controlnet: str | None = None
    overhead: bool = True
    start_up: bool = True

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height in pixels; `None` is the model's own.

        Raises:
            RequestError: `resolution` is none.
        """
        if self.resolution is None:
            return None
        match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", self.resolution)
        if match is None:
            raise RequestError(f"--resolution is {self.resolution!r}, expected WIDTHxHEIGHT, such as 512x512")
        return int(match[1]), int(match[2])

    def setting(self, own_size: tuple[int, int], control: str | None, has_gpu: bool = False) -> Setting:
        """The work that is asked for.

        Args:
            own_size: the model's, width and height in pixels.
            control: name of a ControlNet in the bundle.
            has_gpu: a block is the whole loop there, whose preparations would else count as a step's.
        """
        width, height = self.size or own_size
        block = self.block_steps or (self.steps if self.model in QUICK or has_gpu else 1)
        return Setting(
            task=self.task,
            images=self.batch,
            height=height,
            width=width,
            steps=self.steps,
            block_steps=min(block, self.steps),
            scheduler=self.scheduler,
            guidance_scale=self.guidance_scale,
            control=control,
        )

    def record_name(self, model: str, setting: Setting, own_size: tuple[int, int]) -> str:
        """File name of the record: model and task, and what differs from the defaults.

        Args:
            model: its name, for people.
            own_size: as above.
        """
        size = (setting.width, setting.height)
        parts = ["speed", re.sub(r"[^\w.-]", "_", model), self.task]
        parts += [f"{size[0]}x{size[1]}"] if size != own_size else []
        parts += [f"batch{self.batch}"] if self.batch != SpeedOptions.batch else []
        parts += [f"steps{self.steps}"] if self.steps != SpeedOptions.steps else []
        parts += [self.scheduler] if self.scheduler != SpeedOptions.scheduler else []
        parts += [f"guidance{self.guidance_scale:g}"] if self.guidance_scale != SpeedOptions.guidance_scale else []
        return "_".join(parts) + ".json"


def check(options: SpeedOptions) -> None:
    """Refuse what cannot be measured; nothing is written but the folders that were given.

    Raises:
        IpaError: names the option, what it got and what was expected.
    """
    _check_names(options.names or NAMES)
    bundle = _known_bundle(options)
    given = [name for name in _SOURCES if getattr(options, name) is not None]
    if given and options.model in (*PRESETS, DEMO):
        option = f"--{given[0].replace('_', '-')}"
        raise RequestError(f"{option} goes with a bundle of yours, --model {options.model} has its own: leave it out")
    control = _control(options)
    if bundle is None:  # its models are made later; what is wrong with the request alone is known now
        options.setting(_USUAL_SIZE, None).request()
    else:
        check_fits(bundle, options.setting(own_size(bundle), control))
        _check_sources(options, bundle)
    for name, folder in (("--output", options.output), ("--models", options.folder)):
        _check_writable(name, folder)


def check_fits(bundle: Bundle, setting: Setting) -> None:
    """Whether a bundle can do the work.

    Raises:
        RequestError: it cannot; the message says why.
    """
    with Pipeline.open(bundle.root, verify=False) as pipe:
        pipe.batch_key(setting.request())


def own_size(bundle: Bundle) -> tuple[int, int]:
    """A bundle's usual width and height in pixels."""
    return bundle.manifest.defaults.width, bundle.manifest.defaults.height


def _check_names(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in NAMES:
            raise RequestError(f"unknown contender '{name}', expected some of {', '.join(NAMES)}")
        if names.count(name) > 1:
            raise RequestError(f"--engine names '{name}' more than once; the baseline meets itself without that")


def _known_bundle(options: SpeedOptions) -> Bundle | None:
    """The bundle, where it is there already."""
    if options.model in PRESETS:
        return None
    if options.model == DEMO:
        return Bundle.open(demo_bundle(), verify=False)
    if not Path(options.model).is_dir():
        raise RequestError(f"--model {options.model} is no folder, and none of {', '.join((*PRESETS, DEMO))}")
    return Bundle.open(Path(options.model), verify=False)


def _control(options: SpeedOptions) -> str | None:
    """The name of the ControlNet that was given."""
    if options.controlnet is None:
        return None
    if options.task != "controlnet":
        raise RequestError(f"--controlnet goes with --task controlnet, --task is {options.task}: leave one out")
    from ipa.export.controlnets import ControlNetSource

    source = ControlNetSource.parse(options.controlnet)
    if not (Path(source.location) / "config.json").is_file():
        raise RequestError(
            f"--controlnet {source.location} has no config.json: give a ControlNet's folder of diffusers"
        )
    return source.name


def _check_sources(options: SpeedOptions, bundle: Bundle) -> None:
    """What PyTorch is given must be there, and be what the bundle was made from as far as that can be told."""
    if options.base is not None:
        for name in _CONFIGS:
            if not (options.base / name).is_file():
                raise RequestError(f"--base {options.base} has no {name}: give a pipeline's folder of diffusers")
        encoder = image_encoder_folder(options.base, options.image_encoder)
        if options.adapter is not None and not (encoder / "config.json").is_file():
            raise RequestError(f"{encoder} has no config.json: name the adapter's image encoder with --image-encoder")
    elif options.image_encoder is not None:
        raise RequestError("--image-encoder is for PyTorch's side, which needs --base and --adapter, too")
    if options.adapter is not None:
        try:
            check_adapter(bundle, options.adapter)
        except OSError as error:
            raise RequestError(f"--adapter {options.adapter} cannot be read: {error.strerror}") from error


def _check_writable(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise IpaError(f"{option} {folder} cannot be written: {error.strerror}; give another folder") from error
