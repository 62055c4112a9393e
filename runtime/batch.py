"""Which requests can share the calls of the UNet."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from ipa.engines.bundle import Bundle
from ipa.engines.errors import RequestError
from ipa.runtime.request import Request


def batch_key(request: Request, bundle: Bundle) -> Hashable:
    """What a resolved request must have in common with others to be carried out in one batch."""
    tokens = [
        bundle.adapter(str(prompt.adapter)).tokens * (1 if prompt.masks else len(prompt.images) or 1)
        for prompt in request.all_image_prompts
        for _ in range(prompt.slots)
    ]
    guidance = request.guidance_scale, request.guidance_rescale
    numbers = (request.num_inference_steps, *guidance, request.height, request.width, request.eta)
    task = (request.strength, request.init_image is None, request.mask_image is None)
    embeds = tuple(str(prompt.embeds) for prompt in request.all_image_prompts)  # the number in it is not known yet
    controls = (request.guess_mode, *(control.name for control in request.controls))
    return (*numbers, request.scheduler, *task, *tokens, *embeds, controls)


def check_batch(requests: Sequence[Request], bundle: Bundle) -> None:
    """Refuse resolved requests that differ in what a batch shares.

    Raises:
        RequestError: they do.
    """
    if len({batch_key(request, bundle) for request in requests}) > 1:
        raise RequestError(
            "requests of one batch must have equal steps, sizes, guidance, image prompts and ControlNets"
        )
