"""CUDA source to PTX, which every driver since CUDA 12.1's compiles for its GPU.

`python -m ipa.export.compile_kernels` is for whoever changes `engines/*.cu`; it needs no GPU, but NVRTC 12:
`pip install nvidia-cuda-nvrtc-cu12==12.1.105`.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import click

import ipa.engines
from ipa.engines.bundle import hash_file
from ipa.engines.errors import IpaError

_OPTIONS = (b"--gpu-architecture=compute_75",)  # Turing, the oldest that TensorRT 10.13 runs on


def compile_kernel(source: Path, library: ctypes.CDLL) -> str:
    """PTX of one file, under a line that names the source's sha256.

    Raises:
        IpaError: what NVRTC says against the source.
    """
    program = ctypes.c_void_p()
    text, name = source.read_bytes(), source.name.encode()
    _succeed(library.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None))
    options = (ctypes.c_char_p * len(_OPTIONS))(*_OPTIONS)
    failed = library.nvrtcCompileProgram(program, len(_OPTIONS), options)
    size = ctypes.c_size_t()
    if failed:
        _succeed(library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
        log = ctypes.create_string_buffer(size.value)
        _succeed(library.nvrtcGetProgramLog(program, log))
        raise IpaError(f"{source}: {log.value.decode()}")
    _succeed(library.nvrtcGetPTXSize(program, ctypes.byref(size)))
    ptx = ctypes.create_string_buffer(size.value)
    _succeed(library.nvrtcGetPTX(program, ptx))
    return f"// {source.name}, sha256 {hash_file(source)}\n{ptx.value.decode()}"


def _succeed(code: int) -> None:
    if code:
        raise IpaError(f"NVRTC failed with code {code}")


def _nvrtc() -> ctypes.CDLL:
    spec = importlib.util.find_spec("nvidia.cuda_nvrtc")
    if spec is None or not spec.submodule_search_locations:
        raise IpaError("NVRTC is missing: pip install nvidia-cuda-nvrtc-cu12==12.1.105")
    return ctypes.CDLL(str(Path(spec.submodule_search_locations[0]) / "lib" / "libnvrtc.so.12"))


@click.command()
def main() -> None:
    """Compile every `engines/*.cu` to a `.ptx` beside it."""
    try:
        library = _nvrtc()
        for source in sorted(Path(ipa.engines.__path__[0]).glob("*.cu")):
            source.with_suffix(".ptx").write_text(compile_kernel(source, library))
            click.echo(source.with_suffix(".ptx"))
    except IpaError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
