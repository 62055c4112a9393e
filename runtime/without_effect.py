"""What a request asks for in vain, which its user should know."""

from __future__ import annotations

from ipa.runtime.request import Request
from ipa.runtime.window import is_in_window


def without_effect(request: Request, count: int) -> list[str]:
    """Warnings of options that change nothing.

    Args:
        request: resolved.
        count: steps of the denoising loop.
    """
    warnings = []
    if request.guidance_rescale and not request.has_guidance:
        warnings.append(f"the guidance rescale has no effect at guidance scale {request.guidance_scale}")
    windows = [(f"image prompt of adapter '{one.adapter}'", one.start, one.end) for one in request.all_image_prompts]
    windows += [(f"control image of ControlNet '{one.name}'", one.start, one.end) for one in request.controls]
    return warnings + [
        f"the {name} has no effect: of {count} steps none lies as a whole between the shares {start} and {end}"
        for name, start, end in windows
        if not any(is_in_window(index, count, start, end) for index in range(count))
    ]
