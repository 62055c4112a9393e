"""The request in a picture's PNG text, so that others can read it and `ipa-run --from` can make it again.

The text is the `parameters` entry that AUTOMATIC1111's web interface writes and reads: the prompt, a line
`Negative prompt: ...`, and a last line of `Key: value` pairs, where a value with `,`, `:` or a newline is a JSON
string. Our whole request is one such value.
Source: AUTOMATIC1111/stable-diffusion-webui, modules/infotext_utils.py, `parse_generation_parameters`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from PIL.PngImagePlugin import PngInfo

from ipa.engines.errors import RequestError
from ipa.runtime import png_chunks

TEXT_KEY = "parameters"
REQUEST_KEY = "ipa_request"

_MAX_TEXT_BYTES = 1024**2

# Our scheduler names -> AUTOMATIC1111's sampler and schedule type. PNDM without its Runge-Kutta start is the method
# called PLMS. `Automatic` is the sampler's own type: Karras for DPM++ 2M, whose other one here is Uniform.
_SAMPLERS = {
    "ddim": ("DDIM", "Automatic"),
    "pndm": ("PLMS", "Automatic"),
    "euler": ("Euler", "Automatic"),
    "euler-ancestral": ("Euler a", "Automatic"),
    "dpm++-2m": ("DPM++ 2M", "Uniform"),
    "dpm++-2m-karras": ("DPM++ 2M", "Karras"),
    "unipc": ("UniPC", "Automatic"),
    "lcm": ("LCM", "Automatic"),
    "ddpm": ("DDPM", "Automatic"),
}


def pnginfo(request: Mapping[str, Any]) -> PngInfo:
    """What `PIL.Image.save(..., pnginfo=...)` takes; see `parameters_text` for `request`."""
    info = PngInfo()
    info.add_text(TEXT_KEY, parameters_text(request))
    return info


def parameters_text(request: Mapping[str, Any]) -> str:
    """The request as AUTOMATIC1111 writes it, with the request itself as JSON under `ipa_request`.

    Args:
        request: JSON values only. The fields of `Request` that have a name elsewhere (`prompt`,
            `negative_prompt`, `num_inference_steps`, `scheduler`, `guidance_scale`, `seed`, `height`, `width`,
            `ip_adapter_scale`, `num_images`, `only`) and `version` (of ipa-runtime) are also written under that
            name; any further key lives in the JSON alone.

    Raises:
        ValueError: the request holds NaN or an infinity, which JSON cannot say.
    """
    pairs = {"Steps": request["num_inference_steps"]}
    schedule_type = "Automatic"
    if request["scheduler"] is not None:  # None is the bundle's own
        pairs["Sampler"], schedule_type = _SAMPLERS[request["scheduler"]]
    pairs |= {
        "Schedule type": schedule_type,
        "CFG scale": _number(request["guidance_scale"]),
        "Seed": request["seed"],
        "Size": f"{request['width']}x{request['height']}",
    }
    if isinstance(request["ip_adapter_scale"], int | float):  # else it has no single one, or differs by block
        pairs |= {"IP-Adapter scale": _number(request["ip_adapter_scale"])}
    if request.get("strength") is not None:
        pairs |= {"Denoising strength": _number(request["strength"])}
    if request["only"] is not None:
        pairs |= {"Batch size": request["num_images"], "Batch pos": request["only"]}
    pairs |= {"RNG": "CPU", "Version": f"ipa-runtime {request['version']}"}
    # ASCII within: a file name with bytes that are no text survives, and no line break can end the line.
    request_json = json.dumps(dict(request), allow_nan=False)
    settings = ", ".join(f"{key}: {value}" for key, value in pairs.items())
    lines = [request["prompt"]]
    if request["negative_prompt"]:
        lines.append(f"Negative prompt: {request['negative_prompt']}")
    lines.append(f"{settings}, {REQUEST_KEY}: {json.dumps(request_json)}")
    return "\n".join(lines)


def _number(value: float) -> str:
    """7.0 as `7`, 7.5 as `7.5`."""
    return str(int(value)) if value == int(value) else str(value)


def read_request(path: Path) -> dict[str, Any]:
    """The request that `pnginfo` stored in a PNG file. Its values are as untrusted as the file.

    Raises:
        RequestError: no such file, not a PNG, no request of ours in it, or one that is damaged or too large.
    """
    try:
        with path.open("rb") as file:
            text = _parameters(file, path)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror or 'cannot be read'}") from error
    except ValueError as error:  # from png_chunks, or a NUL in the name
        raise RequestError(f"{path}: {error}; give a PNG that ipa-run wrote") from error
    return _parse(text, path)


def _parameters(file: BinaryIO, path: Path) -> str:
    """The first `parameters` text, from a plain or an international text chunk."""
    wanted = TEXT_KEY.encode() + b"\0"
    for chunk in png_chunks.chunks(file):
        if chunk.kind not in (b"tEXt", b"iTXt"):
            continue
        file.seek(chunk.offset)
        if file.read(len(wanted)) != wanted:
            continue
        if chunk.size > _MAX_TEXT_BYTES:
            raise RequestError(f"{path}: its metadata has {chunk.size} bytes, at most {_MAX_TEXT_BYTES} are read")
        content = png_chunks.read_data(file, chunk)[len(wanted) :]
        if chunk.kind == b"tEXt":
            return content.decode("latin-1")
        # Compression flag and method, then language and translated keyword, each ended by NUL. We write no compression.
        flag, parts = content[:1], content[2:].split(b"\0", 2)
        if flag == b"\0" and len(parts) == 3:
            return parts[2].decode("utf-8", "replace")
    raise RequestError(
        f"{path}: holds no request; it was made with `--no-metadata`, by another program, or lost its metadata"
    )


def _parse(text: str, path: Path) -> dict[str, Any]:
    """The request out of a `parameters` text."""
    # All values before ours are numbers and fixed names, so the first mark on the last line is the real one.
    _, mark, rest = text.rpartition("\n")[2].partition(f', {REQUEST_KEY}: "')
    if not mark:
        raise RequestError(f"{path}: its metadata was written by another program, only ipa-run's can be run again")
    try:
        request_json, _ = json.JSONDecoder().raw_decode('"' + rest)
        request = json.loads(request_json)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: the request in its metadata is damaged; give the options yourself") from error
    if not isinstance(request, dict):
        raise RequestError(f"{path}: the request in its metadata is no JSON object; give the options yourself")
    return request
