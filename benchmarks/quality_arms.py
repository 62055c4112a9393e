"""The ways to draw that are compared: our engine, PyTorch eager, and the base model without image prompt."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ipa.benchmarks.diffusers_pipeline import DiffusersPipeline
from ipa.benchmarks.origin import origin
from ipa.benchmarks.quality_data import Item
from ipa.benchmarks.quality_models import files_sha256
from ipa.benchmarks.quality_pictures import ArmFolder, Drawn, Job
from ipa.engines.bundle import hash_file
from ipa.engines.errors import IpaError
from ipa.engines.registry import backend_named
from ipa.runtime.pipeline import Pipeline
from ipa.runtime.preparation import Preparation
from ipa.runtime.request import Request

ENGINE, TORCH, BASE, SWEEP = "engine", "torch-eager", "base", "sweep"
SWEEP_ITEMS = 8
_BASE_PARTS = (
    "unet",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
    "image_encoder",
)
_SHARED = ("num_inference_steps", "guidance_scale", "scheduler", "ip_adapter_scale", "height", "width", "num_images")


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
    """What PyTorch draws with: a pipeline folder of diffusers and an IP-Adapter file."""

    base: Path
    adapter: Path

    def check(self) -> None:
        """Look whether there is such a thing.

        Raises:
            IpaError: there is not.
        """
        if not (self.base / "model_index.json").is_file():
            raise IpaError(f"--base {self.base}: has no model_index.json; name a pipeline folder in diffusers format")
        if not self.adapter.is_file():
            raise IpaError(f"--adapter {self.adapter}: no such file")

    def settings(self) -> dict[str, Any]:
        """What its pictures depend on."""
        device, dtype = self.target
        versions = origin(("torch", "diffusers", "transformers")).versions
        files = [file for part in _BASE_PARTS for file in (self.base / part).glob("*") if file.is_file()]
        sums = {"base": files_sha256(self.base, files), "adapter": hash_file(self.adapter)}
        return {**sums, "device": device, "dtype": dtype, **versions}

    @property
    def target(self) -> tuple[str, str]:
        """Device and dtype."""
        return ("cuda", "float16") if torch.cuda.is_available() else ("cpu", "float32")


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
        folder = ArmFolder(self._pictures / name, {**self._shared(request), **backend, **models})
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

    def draw_torch(self, folder: ArmFolder, model: TorchModel) -> Drawn:
        """Draw by PyTorch what is missing; its model is loaded for that only, and let go."""
        theirs: DiffusersPipeline | None = None
        if folder.missing(self.jobs):
            device, dtype = model.target
            theirs = DiffusersPipeline(model.base, model.adapter, device=device, dtype=dtype)
        drawn = folder.draw(self.jobs, theirs.draw if theirs else self._nothing)
        del theirs
        gc.collect()
        return drawn

    def _shared(self, request: Request) -> dict[str, Any]:
        """What all pictures of an arm have in common."""
        is_image_only = request.has_image and self._settings.is_image_only
        return {**{name: getattr(request, name) for name in _SHARED}, "is_image_only": is_image_only}

    def _nothing(self, request: Request) -> Any:
        raise AssertionError("nothing was missing")

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
