"""The ways to draw that are compared: our engine, PyTorch eager, and the base model without image prompt."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import ipa.engines
import ipa.runtime
from ipa.benchmarks import diffusers_pipeline
from ipa.benchmarks.diffusers_pipeline import DiffusersPipeline, image_encoder_folder
from ipa.benchmarks.origin import origin
from ipa.benchmarks.quality_data import Item
from ipa.benchmarks.quality_keys import base_sha256, code_sha256, files_sha256, machine_name, manifest_sha256
from ipa.benchmarks.quality_pictures import ArmFolder, Drawn, Job
from ipa.engines.bundle import hash_file
from ipa.engines.closing import Closing
from ipa.engines.errors import IpaError
from ipa.engines.registry import backend_named
from ipa.runtime import image_files
from ipa.runtime.pipeline import Pipeline
from ipa.runtime.preparation import Preparation
from ipa.runtime.request import Request

ENGINE, TORCH, BASE, SWEEP = "engine", "torch-eager", "base", "sweep"
SWEEP_ITEMS = 8
SHARED = ("num_inference_steps", "guidance_scale", "scheduler", "ip_adapter_scale", "height", "width", "num_images")


@dataclass(frozen=True)
class Settings:
    """How all arms draw; `None`: as the bundle says.

    Attributes:
        samples: pictures of each image prompt.
        is_image_only: leave the texts out where there is an image prompt, as the paper's table does.
    """

    samples: int = 4
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    ip_adapter_scale: float | None = None
    height: int | None = None
    width: int | None = None
    is_image_only: bool = False


@dataclass(frozen=True)
class TorchModel:
    """What PyTorch draws with: a pipeline folder of diffusers, an IP-Adapter file and its image encoder.

    Attributes:
        image_encoder: folder; `None`: the pipeline's.
    """

    base: Path
    adapter: Path
    image_encoder: Path | None = None

    def check(self) -> None:
        """Look whether there is such a thing.

        Raises:
            IpaError: there is not.
        """
        if not (self.base / "model_index.json").is_file():
            raise IpaError(f"--base {self.base}: has no model_index.json; name a pipeline folder in diffusers format")
        if not self.adapter.is_file():
            raise IpaError(f"--adapter {self.adapter}: no such file")
        if not (image_encoder_folder(self.base, self.image_encoder) / "config.json").is_file():
            if self.image_encoder is None:
                raise IpaError(f"--base {self.base} has no image_encoder; add --image-encoder DIR, as for ipa-export")
            raise IpaError(
                f"--image-encoder {self.image_encoder}: has no config.json; name a CLIP vision model's folder"
            )

    def settings(self) -> dict[str, Any]:
        """What its pictures depend on."""
        device, dtype = self.target
        versions = origin(("torch", "diffusers", "transformers")).versions
        sums = {"base": base_sha256(self.base), "adapter": hash_file(self.adapter)}
        if (encoder := self.image_encoder) is not None:
            sums["image encoder"] = files_sha256(encoder, encoder.iterdir())
        code = {"code of the PyTorch side": code_sha256(diffusers_pipeline, image_files)}
        return {**sums, "device": device, "dtype": dtype, **versions, **code, "machine": machine_name()}

    @property
    def target(self) -> tuple[str, str]:
        """Device and dtype."""
        return ("cuda", "float16") if torch.cuda.is_available() else ("cpu", "float32")


class TorchPainter(Closing):
    """PyTorch's pipeline, loaded when it is first needed."""

    def __init__(self, model: TorchModel) -> None:
        self.model = model
        self._pipe: DiffusersPipeline | None = None

    def load(self) -> None:
        """Load it, where it is not yet.

        Raises:
            IpaError: diffusers cannot load the model.
        """
        if self._pipe is None:
            device, dtype = self.model.target
            model = self.model
            self._pipe = DiffusersPipeline(
                model.base, model.adapter, image_encoder=model.image_encoder, device=device, dtype=dtype
            )

    def draw(self, request: Request) -> list[Image.Image]:
        """Pictures of a resolved request."""
        assert self._pipe is not None, "not loaded"
        return self._pipe.draw(request)

    def close(self) -> None:
        """Let it go, its memory too."""
        self._pipe = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Arms:
    """The arms of one run, in folders below `pictures`."""

    def __init__(self, pipe: Pipeline, items: Sequence[Item], settings: Settings, pictures: Path) -> None:
        """Resolve the requests.

        Raises:
            RequestError: one does not fit the bundle.
        """
        self._pipe, self._preparation, self._pictures = pipe, Preparation(pipe.bundle), pictures
        self._settings = settings
        self.jobs = [self._job(item) for item in items]
        self.base_jobs = [self._job(item, has_image=False) for item in items]

    @property
    def request(self) -> Request:
        """The first request, for what all share."""
        return self.jobs[0].request

    def sweep_jobs(self, scale: float) -> list[Job]:
        """One sample of the first items at another `ip_adapter_scale`."""
        return [
            replace(job, request=replace(job.request, ip_adapter_scale=scale, num_images=1))
            for job in self.jobs[:SWEEP_ITEMS]
        ]

    def engine_folder(self, name: str, jobs: Sequence[Job]) -> ArmFolder:
        """Where our engine's pictures of these jobs are.

        Raises:
            IpaError: others are there.
        """
        request = jobs[0].request
        backend = {"engine": self._pipe.engine, "engine_version": backend_named(self._pipe.engine).version}
        models = {f"bundle's {part}": sha256 for part, sha256 in self._pipe.models(request).items()}
        rest = {
            "manifest": manifest_sha256(self._pipe.manifest),
            "code of ipa.engines and ipa.runtime": code_sha256(ipa.engines, ipa.runtime),
            "machine": machine_name(),
        }
        folder = ArmFolder(self._pictures / name, {**self._shared(request), **backend, **models, **rest})
        folder.check(jobs)
        return folder

    def torch_folder(self, model: TorchModel) -> ArmFolder:
        """Where PyTorch's pictures are.

        Raises:
            IpaError: others are there.
        """
        folder = ArmFolder(self._pictures / TORCH, {**self._shared(self.request), **model.settings()})
        folder.check(self.jobs)
        return folder

    def draw_engine(self, folder: ArmFolder, jobs: Sequence[Job]) -> Drawn:
        """Draw by our engine what is missing."""
        return folder.draw(jobs, lambda request: self._pipe.run(request).images)

    def draw_torch(self, folder: ArmFolder, painter: TorchPainter) -> Drawn:
        """Draw by PyTorch what is missing.

        Raises:
            IpaError: its model cannot be loaded.
            RuntimeError, ValueError: of PyTorch and diffusers, while they draw.
        """
        if folder.missing(self.jobs):
            painter.load()
        return folder.draw(self.jobs, painter.draw)

    def _shared(self, request: Request) -> dict[str, Any]:
        """What all pictures of an arm have in common."""
        is_image_only = request.has_image and self._settings.is_image_only
        return {**{name: getattr(request, name) for name in SHARED}, "is_image_only": is_image_only}

    def _job(self, item: Item, has_image: bool = True) -> Job:
        settings = self._settings
        request = Request(
            prompt="" if has_image and settings.is_image_only else item.text,
            image=item.reference if has_image else None,
            ip_adapter_scale=settings.ip_adapter_scale if has_image else None,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            scheduler=settings.scheduler,
            height=settings.height,
            width=settings.width,
            num_images=settings.samples,
            seed=item.number,
        )
        return Job(item, self._preparation.resolved(request))
