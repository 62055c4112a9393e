"""A request made ready for one bundle: nothing left open, checked against it, its files read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ipa.engines.bundle import Bundle
from ipa.engines.errors import BundleError, RequestError
from ipa.runtime.controls import opened_controls, resolved_controls
from ipa.runtime.image_slots import check_slots, opened
from ipa.runtime.images import open_image
from ipa.runtime.request import Request
from ipa.runtime.run import Run
from ipa.runtime.schedulers import Schedule, create_scheduler
from ipa.runtime.without_effect import without_effect


class Preparation:
    """Makes requests ready."""

    def __init__(self, bundle: Bundle) -> None:
        """Read what the bundle says of its scheduler.

        Raises:
            BundleError: its configuration is no JSON object.
        """
        self._bundle, self._manifest = bundle, bundle.manifest
        self._scheduler_config = _read_json(bundle.file(bundle.manifest.scheduler))

    @property
    def is_inpainting(self) -> bool:
        """Whether the UNet takes a mask and the masked picture."""
        unet = self._manifest.components["unet"].spec
        return unet.inputs[0].axes[1] != unet.outputs[0].axes[1]

    def latent_shape(self, request: Request) -> tuple[int, int, int]:
        """Channels, height and width of a resolved request's latents."""
        assert request.height and request.width
        downscale, channels = self._manifest.vae.downscale, self._manifest.components["unet"].spec.outputs[0].axes[1]
        return int(channels), request.height // downscale, request.width // downscale

    def resolved(self, request: Request) -> Request:
        """The request with nothing left open.

        Raises:
            RequestError: it does not fit the bundle, or the picture that it starts from cannot be read.
        """
        return self._resolved(request, _opened(request.init_image))[0]

    def run(self, request: Request) -> Run:
        """The request resolved, with its run of the scheduler and its pictures.

        Raises:
            RequestError: it does not fit the bundle, or a file cannot be read.
        """
        init_image, mask_image = _opened(request.init_image), _opened(request.mask_image)
        request, schedule = self._resolved(request, init_image)
        prompts = tuple(opened(prompt, self._bundle) for prompt in request.all_image_prompts)
        controls, warnings = opened_controls(request.controls), without_effect(request, len(schedule.timesteps))
        return Run(request, schedule, prompts, init_image, mask_image, controls, warnings=tuple(warnings))

    def _resolved(self, request: Request, init_image: Image.Image | None) -> tuple[Request, Schedule]:
        request = request.sized(init_image).resolved(self._manifest)
        check_slots(request.all_image_prompts, self._bundle)
        request = replace(request, controls=resolved_controls(request.controls, self._bundle))
        if self.is_inpainting and request.mask_image is None:
            raise RequestError(
                f"{self._bundle.root} holds an inpainting model, which fills a part of a picture: "
                "add --init-image and --mask-image"
            )
        scheduler = create_scheduler(request.scheduler, self._scheduler_config)
        assert request.num_inference_steps is not None
        if request.first_step == request.num_inference_steps:
            raise RequestError(
                f"strength {request.strength} of {request.num_inference_steps} steps leaves none: "
                "raise --strength or --steps"
            )
        schedule = scheduler.schedule(request.num_inference_steps, eta=request.eta, start=request.first_step)
        return replace(request, scheduler=scheduler.name), schedule


def _opened(picture: Image.Image | Path | str | None) -> Image.Image | None:
    return None if picture is None else open_image(picture)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise BundleError(f"{path} is not JSON ({error}); export the bundle again") from error
    if not isinstance(config, dict):
        raise BundleError(f"{path} is not a JSON object; export the bundle again")
    return config
