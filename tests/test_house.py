"""The house rules: who may import what, and what a wheel holds."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "diffusers", "onnx", "onnxscript", "accelerate"}
# What each folder may import of ours; engines and runtime also keep every heavy framework out.
ALLOWED = {
    "engines": {"engines"},
    "runtime": {"engines", "runtime"},
    "trainer": {"trainer"},
    "export": {"engines", "trainer", "export"},
}

# Run in a new process: whatever imports a heavy framework fails there as if it were not installed.
WITHOUT_FRAMEWORKS = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(HEAVY)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            if node.module == "ipa":
                names |= {f"ipa.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_folders_import_only_what_they_may(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "ipa":
                assert parts[1] in ALLOWED[folder], f"{path} imports {name}"
            if folder in ("engines", "runtime"):
                assert parts[0] not in HEAVY, f"{path} imports {name}"


def test_ipa_run_works_where_no_framework_is_installed(tiny_bundle: Path, tmp_path: Path) -> None:
    code = WITHOUT_FRAMEWORKS + (
        "from ipa.runtime.cli import main\n"
        f"sys.argv = ['ipa-run', '--bundle', {str(tiny_bundle)!r}, '--prompt', 'a cat', '--steps', '2',"
        f" '--height', '64', '--width', '64', '--seed', '0', '--output', {str(tmp_path / 'x.png')!r}]\n"
        "main()\n"
        f"heavy = {sorted(HEAVY)!r}\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] in heavy]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0


@pytest.mark.parametrize(
    "command", ["ipa.runtime.cli", "ipa.runtime.doctor", "ipa.export.cli", "ipa.trainer.cli", "ipa.benchmarks.cli"]
)
def test_help_needs_no_framework(command: str) -> None:
    code = WITHOUT_FRAMEWORKS + f"sys.argv = ['x', '--help']\nfrom {command} import main\nmain()\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory in use from /proc")
def test_importing_the_runtime_is_light() -> None:
    """60 MiB in all is the promise for an interpreter with everything a pipeline imports."""
    code = (
        "import sys\n"
        "from ipa.runtime import Pipeline, Request\n"
        "late = {'concurrent.futures', 'email', 'importlib.metadata', 'socket', 'tokenizers'} & set(sys.modules)\n"
        "assert not late and 'ipa.runtime.schedulers.ddim' not in sys.modules, late\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmRSS')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 60 * 1024, f"{int(done.stdout) / 1024:.0f} MiB"


def test_the_wheel_holds_every_module_and_the_demo(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    copy = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    subprocess.run([*command, str(copy)], capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for folder in (*ALLOWED, "benchmarks"):
        for path in (copy / folder).rglob("*.py"):
            assert f"ipa/{path.relative_to(copy)}" in held
    assets = (*(copy / "runtime" / "assets").rglob("*"), *(copy / "export" / "assets").rglob("*"))
    for path in (*assets, *(copy / "engines").glob("*.ptx"), *(copy / "benchmarks" / "templates").iterdir()):
        if path.is_file():
            assert f"ipa/{path.relative_to(copy)}" in held
    assert not any(name.startswith(("tests/", "trainer/", "runtime/", "export/")) for name in held)
