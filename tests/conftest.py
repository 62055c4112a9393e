"""Fixtures shared by all tests: tiny models and one exported bundle, made once per session."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock


def pytest_configure(config: pytest.Config) -> None:
    """A core for each worker, before any library counts them.

    Tiny models gain nothing from threads, and threads that spin while they wait for a core that another process has are
    slower by an order of magnitude. The process that starts the workers keeps all: they inherit what it has.
    """
    is_controller = "PYTEST_XDIST_WORKER" not in os.environ and config.getoption("numprocesses", None)
    if hasattr(os, "sched_setaffinity") and not is_controller:
        cores = sorted(os.sched_getaffinity(0))
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        os.sched_setaffinity(0, {cores[worker % len(cores)]})


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the whole session, the same for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(folder: Path, name: str, make: Callable[[Path], object]) -> Path:
    """`folder / name`, made by the first worker that asks while the others wait."""
    path = folder / name
    with FileLock(folder / f"{name}.lock"):
        done = folder / f"{name}.done"
        if not done.exists():
            make(path)
            done.touch()
    return path


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine with a GPU."""
    from fake_gpu import environment

    return environment(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="session")
def tiny_base(session_folder: Path) -> Path:
    """Folder of a tiny random pipeline. Read only: copy it before changing anything."""
    from tiny import tiny_pipeline

    return made_once(session_folder, "tiny_base", tiny_pipeline)


@pytest.fixture(scope="session")
def tiny_adapter_file(session_folder: Path, tiny_base: Path) -> Path:
    """A random IP-Adapter of 4 tokens for `tiny_base`, as `.safetensors`."""
    from tiny import tiny_adapter

    config = json.loads((tiny_base / "unet" / "config.json").read_text())
    return made_once(session_folder, "tiny_adapter.safetensors", lambda file: tiny_adapter(config, file))


@pytest.fixture(scope="session")
def tiny_bundle(session_folder: Path, tiny_base: Path, tiny_adapter_file: Path) -> Path:
    """An FP32 bundle of `tiny_base` with the adapter `tiny`. Read only: copy it before changing anything."""
    from ipa.export.adapters import AdapterFile
    from ipa.export.build import ExportRequest, export_bundle

    def make(output: Path) -> None:
        adapters = (AdapterFile("tiny", tiny_adapter_file),)
        export_bundle(ExportRequest(base=str(tiny_base), output=output, adapters=adapters))

    return made_once(session_folder, "tiny_bundle", make)


@pytest.fixture(scope="session")
def tiny_half_bundle(session_folder: Path, tiny_base: Path, tiny_adapter_file: Path) -> Path:
    """As `tiny_bundle`, in FP16. Read only, too."""
    from ipa.export.adapters import AdapterFile
    from ipa.export.build import ExportRequest, export_bundle

    def make(output: Path) -> None:
        adapters = (AdapterFile("tiny", tiny_adapter_file),)
        export_bundle(ExportRequest(base=str(tiny_base), output=output, adapters=adapters, dtype="float16"))

    return made_once(session_folder, "tiny_half_bundle", make)


@pytest.fixture(scope="session")
def tiny_kind_files(session_folder: Path, tiny_base: Path, tiny_adapter_file: Path) -> dict[str, Path]:
    """One random adapter of every kind for `tiny_base`, in both containers."""
    from tiny import tiny_adapter

    config = json.loads((tiny_base / "unet" / "config.json").read_text())
    plus = made_once(
        session_folder, "tiny_plus.bin", lambda file: tiny_adapter(config, file, tokens=16, seed=1, kind="plus")
    )
    full_face = made_once(
        session_folder, "tiny_full_face.safetensors", lambda file: tiny_adapter(config, file, seed=2, kind="full-face")
    )
    return {"base": tiny_adapter_file, "plus": plus, "full-face": full_face}


@pytest.fixture(scope="session")
def tiny_kinds_bundle(session_folder: Path, tiny_bundle: Path, tiny_kind_files: dict[str, Path]) -> Path:
    """`tiny_bundle` with an adapter of every kind, named `tiny`, `plus` and `full-face`, added later. Read only."""
    return made_once(
        session_folder, "tiny_kinds_bundle", lambda folder: _with_kinds(tiny_bundle, folder, tiny_kind_files)
    )


@pytest.fixture(scope="session")
def tiny_kinds_half_bundle(session_folder: Path, tiny_half_bundle: Path, tiny_kind_files: dict[str, Path]) -> Path:
    """As `tiny_kinds_bundle`, in FP16."""
    return made_once(
        session_folder, "tiny_kinds_half_bundle", lambda folder: _with_kinds(tiny_half_bundle, folder, tiny_kind_files)
    )


@pytest.fixture(scope="session")
def tiny_controlnets(session_folder: Path, tiny_base: Path) -> dict[str, Path]:
    """Random ControlNets for `tiny_base` by name; `mood` has residuals without place and takes BGR."""
    from tiny import tiny_controlnet

    options: dict[str, dict[str, Any]] = {
        "edges": {"seed": 1},
        "pose": {"seed": 2},
        "mood": {"seed": 3, "global_pool_conditions": True, "controlnet_conditioning_channel_order": "bgr"},
    }

    def make(name: str) -> Callable[[Path], object]:
        return lambda folder: tiny_controlnet(tiny_base, folder, **options[name])

    return {name: made_once(session_folder, f"controlnet_{name}", make(name)) for name in options}


@pytest.fixture(scope="session")
def tiny_control_bundle(
    session_folder: Path, tiny_base: Path, tiny_adapter_file: Path, tiny_controlnets: dict[str, Path]
) -> Path:
    """As `tiny_bundle`, with `tiny_controlnets`. Read only, too."""
    from ipa.export.adapters import AdapterFile
    from ipa.export.build import ExportRequest, export_bundle
    from ipa.export.controlnets import ControlNetSource

    def make(output: Path) -> None:
        adapters = (AdapterFile("tiny", tiny_adapter_file),)
        controlnets = tuple(ControlNetSource(name, str(folder)) for name, folder in tiny_controlnets.items())
        export_bundle(ExportRequest(str(tiny_base), output, adapters=adapters, controlnets=controlnets))

    return made_once(session_folder, "tiny_control_bundle", make)


def _with_kinds(bundle: Path, folder: Path, files: dict[str, Path]) -> None:
    from ipa.export.adapters import AdapterFile
    from ipa.export.bundle_adapters import add_adapter

    shutil.copytree(bundle, folder)
    for kind in ("plus", "full-face"):
        add_adapter(folder, AdapterFile(kind, files[kind]), force=False, is_default=False)


@pytest.fixture(scope="session")
def tiny_xl_base(session_folder: Path) -> Path:
    """Folder of a tiny random Stable Diffusion XL. Read only."""
    from tiny_xl import tiny_xl_pipeline

    return made_once(session_folder, "tiny_xl_base", tiny_xl_pipeline)


@pytest.fixture(scope="session")
def tiny_xl_files(session_folder: Path, tiny_xl_base: Path) -> dict[str, Path]:
    """Random adapters for `tiny_xl_base`, of the kinds `base` and `plus`."""
    from tiny import tiny_adapter

    config = json.loads((tiny_xl_base / "unet" / "config.json").read_text())
    base = made_once(session_folder, "tiny_xl_adapter.safetensors", lambda file: tiny_adapter(config, file))
    plus = made_once(
        session_folder, "tiny_xl_plus.bin", lambda file: tiny_adapter(config, file, tokens=16, seed=1, kind="plus")
    )
    return {"base": base, "plus": plus}


@pytest.fixture(scope="session")
def tiny_xl_controlnets(session_folder: Path, tiny_xl_base: Path) -> dict[str, Path]:
    """Random ControlNets for `tiny_xl_base`; `pose` has no attention, `mood` no place."""
    from tiny import tiny_controlnet

    without_attention = {"down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D"}
    options: dict[str, dict[str, Any]] = {
        "edges": {"seed": 1},
        "pose": {"seed": 2, **without_attention},
        "mood": {"seed": 3, "global_pool_conditions": True},
    }

    def make(name: str) -> Callable[[Path], object]:
        return lambda folder: tiny_controlnet(tiny_xl_base, folder, **options[name])

    return {name: made_once(session_folder, f"xl_controlnet_{name}", make(name)) for name in options}


@pytest.fixture(scope="session")
def tiny_xl_bundle(
    session_folder: Path, tiny_xl_base: Path, tiny_xl_files: dict[str, Path], tiny_xl_controlnets: dict[str, Path]
) -> Path:
    """An FP32 bundle of `tiny_xl_base` with both adapters, named by their kinds, and all ControlNets. Read only."""
    parts = str(tiny_xl_base), tiny_xl_files, tiny_xl_controlnets
    return made_once(session_folder, "tiny_xl_bundle", lambda folder: _export_xl(folder, *parts, "float32"))


@pytest.fixture(scope="session")
def tiny_xl_half_bundle(
    session_folder: Path, tiny_xl_base: Path, tiny_xl_files: dict[str, Path], tiny_xl_controlnets: dict[str, Path]
) -> Path:
    """As `tiny_xl_bundle`, in FP16 and without the ControlNets that have no attention or no place."""
    parts = str(tiny_xl_base), tiny_xl_files, {"edges": tiny_xl_controlnets["edges"]}
    return made_once(session_folder, "tiny_xl_half_bundle", lambda folder: _export_xl(folder, *parts, "float16"))


@pytest.fixture(scope="session")
def tiny_xl_inpainting(session_folder: Path, tiny_xl_files: dict[str, Path]) -> tuple[Path, Path]:
    """A tiny SDXL with a 9-channel UNet that encodes empty negative prompts, and its FP32 bundle without ControlNets.

    Read only, both.
    """
    from tiny_xl import tiny_xl_pipeline

    def make(folder: Path) -> None:
        base = tiny_xl_pipeline(folder / "base", in_channels=9, force_zeros_for_empty_prompt=False)
        _export_xl(folder / "bundle", str(base), {"base": tiny_xl_files["base"]}, {}, "float32")

    folder = made_once(session_folder, "tiny_xl_inpainting", make)
    return folder / "base", folder / "bundle"


def _export_xl(output: Path, base: str, files: dict[str, Path], controlnets: dict[str, Path], dtype: str) -> None:
    from ipa.export.adapters import AdapterFile
    from ipa.export.build import ExportRequest, export_bundle
    from ipa.export.controlnets import ControlNetSource

    adapters = tuple(AdapterFile(name, file) for name, file in files.items())
    controls = tuple(ControlNetSource(name, str(folder)) for name, folder in controlnets.items())
    export_bundle(ExportRequest(base, output, adapters=adapters, dtype=dtype, controlnets=controls))


@pytest.fixture(scope="session")
def other_vae(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE folder of the same sizes, other weights and another scaling factor."""
    from tiny import another_vae

    return another_vae(tiny_base, tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that look at pictures, data in COCO's layout, and a pipeline without an image encoder."""
    from tiny_eyes import all_eyes

    return all_eyes(tmp_path_factory.mktemp("eyes"))


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """An image prompt."""
    from picture_files import random_picture

    random_picture(50, 40).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


@pytest.fixture
def ipa_run(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Call the command in `tmp_path`; returns exit code, standard output, standard error."""
    from commands import call_ipa_run

    def call(*arguments: object, bundle: Path = tiny_bundle) -> tuple[int, str, str]:
        given = list(arguments)
        if "--from" not in given and "--bundle" not in given:
            given += ["--bundle", bundle]
        if "--from" not in given and "--engine" not in given:
            given += ["--engine", "onnxruntime"]  # the same bits everywhere; with --from the recorded one is taken
        monkeypatch.chdir(tmp_path)
        return call_ipa_run(monkeypatch, capsys, *given)

    return call
