"""Image prompts by the fields that somebody named: what goes before is laid over what was there.

So `ipa-run --from` changes what a picture's record says, and a line of `--requests` what the command says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from ipa.engines.errors import RequestError
from ipa.runtime.image_prompt import ImagePrompt

PromptFields: TypeAlias = Mapping[str, Any]  # some of `ImagePrompt`

_SIMPLE = {"image": "images", "adapter": "adapter", "ip_adapter_scale": "scale"}  # of `Request`, of `ImagePrompt`
IMAGE_FIELDS = frozenset({*_SIMPLE, "image_prompts"})


def prompts_of(fields: Mapping[str, Any]) -> list[PromptFields]:
    """The image prompts among fields of `Request`, whose `image_prompts` are `PromptFields` here.

    Raises:
        RequestError: there is a simple one, too.
    """
    simple = {name: fields[key] for key, name in _SIMPLE.items() if fields.get(key) is not None}
    several = list(fields.get("image_prompts") or ())
    if simple and several:
        raise RequestError("image_prompts take the place of image, adapter and ip_adapter_scale: give one or other")
    if "images" in simple:
        simple["images"] = (simple["images"],)
    return several or ([simple] if simple else [])


def has_pictures(prompt: PromptFields) -> bool:
    """Whether it shows anything."""
    return bool(prompt.get("images")) or prompt.get("embeds") is not None


def laid_over(base: Sequence[PromptFields], over: Sequence[PromptFields]) -> list[PromptFields]:
    """Image prompts with what others say in front of them.

    One goes over one, whatever its adapter. Else each goes over the one of its adapter; several in `base` all stay.

    Raises:
        RequestError: it is not clear over which one.
    """
    if len(base) == len(over) == 1:
        return [_over(base[0], over[0])]
    if len(base) <= 1:
        return [_over(_of_adapter(base, prompt), prompt) for prompt in over] or list(base)
    adapters = [prompt.get("adapter") for prompt in base]
    for prompt in over:
        if adapters.count(prompt.get("adapter")) != 1:
            raise RequestError(
                "there are several image prompts already: say which one changes by --adapter NAME, with NAME one of "
                f"{', '.join(map(str, adapters))}"
            )
    return [_over(prompt, _of_adapter(over, prompt)) for prompt in base]


def request_fields(prompts: Sequence[PromptFields]) -> dict[str, Any]:
    """Fields of `Request`: the simple ones where they say it all.

    Raises:
        RequestError: a prompt has no image.
    """
    if not prompts:
        return {}
    if len(prompts) == 1 and len(prompts[0].get("images", ())) <= 1:
        plain = vars(ImagePrompt)  # the dataclass's defaults
        named = {name: value for name, value in prompts[0].items() if value != plain[name]}
        if set(named) <= set(_SIMPLE.values()):
            simple = {key: named[name] for key, name in _SIMPLE.items() if name in named}
            return simple if "images" not in named else {**simple, "image": named["images"][0]}
    return {"image_prompts": tuple(ImagePrompt(**prompt) for prompt in prompts)}


def _of_adapter(prompts: Sequence[PromptFields], prompt: PromptFields) -> PromptFields:
    return next((one for one in prompts if one.get("adapter") == prompt.get("adapter")), {})


def _over(base: PromptFields, over: PromptFields) -> PromptFields:
    """Images and embeds take each other's place."""
    replaced = {"images", "embeds"} if has_pictures(over) else set()
    return {**{name: value for name, value in base.items() if name not in replaced}, **over}
