"""What the benchmarks tell of the installation, and what their commands say of bad input."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ipa.benchmarks import gpu_check, models, origin
from ipa.benchmarks.engine_build import ShapeProfile, build_engine
from ipa.benchmarks.start_up import closure
from ipa.engines.bundle import Bundle
from ipa.engines.cuda_driver import Driver, Gpu


@pytest.mark.parametrize("command", ["slot_cost", "pipeline_memory"])
def test_a_bundle_that_is_none_is_told_in_one_line(command: str, tmp_path: Path) -> None:
    module = importlib.import_module(f"ipa.benchmarks.{command}")
    place = str(tmp_path)
    options = {"slot_cost": ["--other", place], "pipeline_memory": ["--base", place, "--adapter", place]}[command]
    result = CliRunner().invoke(module.main, ["--bundle", place, *options])
    assert result.exit_code == 2, result.output
    assert result.output.startswith(f"{command}: ") and len(result.output.splitlines()) == 1


def test_libraries_are_quiet_in_a_process_of_its_own(tmp_path: Path) -> None:
    """They talk while they are imported, which happened long ago in the tests' own process."""
    code = "from ipa.benchmarks.cli import main; main()"
    command = [sys.executable, "-c", code, "speed", "--engine", "warp", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1, done.stderr


def test_gpu_check_tells_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "prepare", lambda folder, sizes: tmp_path)
    result = CliRunner().invoke(gpu_check.main, ["--model", "small", "--output", str(tmp_path)])
    assert result.exit_code == 2, result.output
    assert result.output.splitlines()[-1].startswith(f"gpu_check: {tmp_path}")


def test_an_adapter_that_was_half_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(file: Path, **options: object) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    for module in (models, gpu_check):
        monkeypatch.setattr(module, "write_adapter", breaks)
    monkeypatch.setattr(gpu_check, "write_pipeline", lambda folder, sizes: None)
    with pytest.raises(KeyboardInterrupt):
        models.write_plus_adapter(models.Models("small", "", tmp_path, folder=tmp_path))
    with pytest.raises(KeyboardInterrupt):
        gpu_check.prepare(tmp_path, gpu_check.SMALL)
    assert not list(tmp_path.iterdir())


def installed(folder: Path, name: str, *requires: str) -> None:
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    needs = "".join(f"Requires-Dist: {one}\n" for one in requires)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}")


def test_what_an_installation_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    needs = ["ipa_Fake.hub>=1", 'ipa-fake-linux; platform_system == "Linux"', 'ipa-fake-other; sys_platform == "win32"']
    installed(tmp_path, "ipa-fake-root", *needs, 'ipa-fake-extra; extra == "all"', "ipa-fake-absent")
    for name in ("ipa-fake-hub", "ipa-fake-linux", "ipa-fake-other", "ipa-fake-extra"):
        installed(tmp_path, name, "ipa-fake-hub")
    assert closure(("ipa_fake_root", "ipa-fake-root")) == {"ipa-fake-root", "ipa-fake-hub", "ipa-fake-linux"}


def test_nvidia_s_versions_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  560.35.03  Release Build\nGCC 12.3.0\n")
    monkeypatch.setattr(origin, "_DRIVER", file)
    monkeypatch.setattr(origin, "find_driver", lambda: Driver((12, 6), (Gpu("x", "9.0", 1),)))
    monkeypatch.setattr(origin, "is_installed", lambda engine: engine == "tensorrt")
    monkeypatch.setattr(origin, "library_version", lambda engine: "11.4.0.106 cu13")
    versions = origin.origin().versions
    expected = {"tensorrt": "11.4.0.106 cu13", "CUDA of the driver": "12.6", "NVIDIA driver": "560.35.03"}
    assert {name: versions[name] for name in expected} == expected
    assert "tensorrt_rtx" not in versions


@pytest.mark.parametrize(("batch", "expected"), [(1, "1:1:4"), (3, "1:3:4"), (8, "1:8:8")])
def test_engines_are_built_for_the_batch(
    batch: int, expected: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiles = list[ShapeProfile]()

    class Builds:
        def __init__(self, bundle: Bundle, cache: object, engine: str, profile: ShapeProfile) -> None:
            profiles.append(profile)

        def survey(self) -> tuple[list[str], list[str]]:
            return [], []

        def run(self, jobs: list[str]) -> None: ...

    monkeypatch.setattr("ipa.benchmarks.engine_build.EngineBuilds", Builds)
    build_engine(Bundle.open(tiny_bundle, verify=False), "tensorrt", "768x512", batch)
    assert str(profiles[0].batch) == expected and (profiles[0].width.usual, profiles[0].height.usual) == (768, 512)
