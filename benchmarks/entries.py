"""Who takes part in a speed run, by name: PyTorch's side, plain onnxruntime, and our back-ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ipa.benchmarks.contender import Setting
from ipa.benchmarks.models import Models
from ipa.benchmarks.processes import Entry
from ipa.benchmarks.records import NotMeasured
from ipa.engines.bundle import Bundle
from ipa.engines.registry import BACKENDS, Backend, backend_named

HALF = "-bf16"  # of a CPU: PyTorch in the precision that OpenVINO takes there
TORCH = {
    "torch-eager": "PyTorch eager (diffusers)",
    "torch-compile": "PyTorch, torch.compile (diffusers)",
    f"torch-eager{HALF}": "PyTorch eager in bfloat16 (diffusers)",
    f"torch-compile{HALF}": "PyTorch in bfloat16, torch.compile (diffusers)",
}
PLAIN = "onnxruntime-plain"
NAMES = (*TORCH, PLAIN, *(backend.name for backend in reversed(BACKENDS)))
_TORCH_SIDE, _OUR_SIDE = "ipa.benchmarks.torch_contenders", "ipa.benchmarks.our_contenders"


def entries(
    names: Sequence[str], models: Models, setting: Setting, device: str, built: Mapping[str, float]
) -> tuple[list[Entry], list[NotMeasured]]:
    """The contenders that can run here, in order, and why the others cannot.

    Args:
        names: some of `NAMES`.
        device: `cuda` or `cpu`, for PyTorch.
        built: seconds that building engines took, by name.
    """
    found, missing = list[Entry](), list[NotMeasured]()
    for name in names:
        reason = _obstacle(name, models, setting, device)
        if reason:
            missing.append(NotMeasured(name, reason))
        else:
            found.append(replace(_entry(name, models, setting, device), build_seconds=built.get(name)))
    return found, missing


def torch_options(models: Models, setting: Setting, device: str) -> dict[str, Any]:
    """Keywords of `TorchPipeline`."""
    return {
        "base": str(models.base),
        "adapter": str(models.adapter) if setting.has_image else None,
        "image_encoder": None if models.image_encoder is None else str(models.image_encoder),
        "controlnet": None if models.controlnet is None else str(models.controlnet),
        "setting": asdict(setting),
        "device": device,
        "dtype": "float16" if device == "cuda" else "float32",
    }


def torch_entry(name: str, models: Models, setting: Setting, device: str) -> Entry:
    """PyTorch's side, eager or compiled."""
    options = torch_options(models, setting, device) | {"is_compiled": name.removesuffix(HALF) == "torch-compile"}
    if name.endswith(HALF):
        options["dtype"] = "bfloat16"
    return Entry(name, TORCH[name], f"{_TORCH_SIDE}:TorchPipeline", options)


def plain_engine(device: str) -> str:
    """What runs the ordinary graph: onnxruntime on the device that PyTorch has."""
    return "onnxruntime-cuda" if device == "cuda" else "onnxruntime"


def has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16, as PyTorch's own kernels ask it."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _entry(name: str, models: Models, setting: Setting, device: str) -> Entry:
    if name in TORCH:
        return torch_entry(name, models, setting, device)
    options = {"bundle": str(models.bundle), "setting": asdict(setting)}
    if name == PLAIN:
        engine = plain_engine(device)
        title = f"{engine}, ordinary graph with the adapter in it"
        plain = {**options, "merged": str(models.merged), "engine": engine}
        return Entry(name, title, f"{_OUR_SIDE}:PlainPipeline", plain)
    return Entry(name, f"ours on {name}", f"{_OUR_SIDE}:OurPipeline", {**options, "engine": name})


def _obstacle(name: str, models: Models, setting: Setting, device: str) -> str:
    """Why a contender cannot take part; empty if it can."""
    if name in TORCH:
        if name.endswith(HALF) and device == "cuda":
            return "on a GPU, PyTorch runs in float16 already"
        if name.endswith(HALF) and not has_bfloat16():
            return "this CPU has no instructions for bfloat16"
        if models.base is None or models.adapter is None:
            return "PyTorch needs what the bundle was exported from: add --base and --adapter"
        if setting.task == "controlnet" and models.controlnet is None:
            return "PyTorch needs the ControlNet that the bundle was exported with: add --controlnet"
        return models.torch_obstacle
    if name == PLAIN:
        if models.merged is None or setting.task != "variation":
            return f"there is no ordinary graph of {models.name} for the task {setting.task}"
        backend: Backend = backend_named(plain_engine(device))
    else:
        backend = backend_named(name)
    if not backend.is_installed:
        return f"not installed: {backend.install()}"
    bundle = Bundle.open(models.bundle, verify=False)
    return backend.obstacle([bundle.graph(part) for part in bundle.manifest.components])
