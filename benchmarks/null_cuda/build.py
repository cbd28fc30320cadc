"""Build a CUDA that does nothing, for a PyTorch that was built for CUDA, on a machine without a GPU.

    python benchmarks/null_cuda/build.py FOLDER

PyTorch's own kernels, Triton's and cuBLAS's products are launched, and do nothing: tensors hold zeros,
or what was copied into them. All else is real: PyTorch's allocator, its dispatch, Inductor's code, Triton's
compiler and launcher, CUDA graphs and what is forbidden while they are recorded. So what the *host* does
for a step can be run and timed; not what comes of it. ``benchmarks/host_time.py`` does.

Needs g++, the headers of CUDA's toolkit (``CUDA_HOME``, or where ``nvcc`` is), and a PyTorch with CUDA 13
from PyPI. What a library exports and no source here defines is made a function that returns success.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# What is built, from what, and what of NVIDIA's it stands in for.
LIBRARIES = {
    "libcudart.so.13": "runtime.cpp",
    "libcuda.so.1": "driver.cpp",
    "libcublasLt.so.13": "blas_lt.cpp",
    "libcublas.so.13": "blas.cpp",
}


def nvidia() -> Path:
    """Where the libraries are that came with PyTorch."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    found = Path(torch.origin).parents[1] / "nvidia" / "cu13"
    if not found.is_dir():
        raise SystemExit("PyTorch was not built for CUDA 13: there is no nvidia/cu13 beside it.")
    return found


def includes() -> list[str]:
    """Where CUDA's headers are."""
    nvcc = shutil.which("nvcc")
    homes = [
        os.environ.get("CUDA_HOME"),
        Path(nvcc).resolve().parents[1] if nvcc else None,
        "/usr/local/cuda",
    ]
    for home in homes:
        if home is not None and (Path(home) / "include" / "crt" / "host_defines.h").exists():
            return [f"-I{nvidia() / 'include'}", f"-I{Path(home) / 'include'}"]
    raise SystemExit("The headers of CUDA's toolkit are not found; say where it is with CUDA_HOME.")


def exported(library: str) -> set[str]:
    """The functions that a library has."""
    if library == "libcuda.so.1":  # of which there is none here, but its header
        text = (nvidia() / "include" / "cuda.h").read_text()
        words = {word.split("(")[0] for line in text.splitlines() for word in line.split()}
        return {
            word for word in words if word.startswith("cu") and word[2:3].isupper() and word.isidentifier()
        }
    command = ["nm", "-D", "--defined-only", str(nvidia() / "lib" / library)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {line.split()[2].split("@")[0] for line in lines if line.split()[1] == "T"}


def defined(object_file: Path) -> set[str]:
    command = ["nm", "-g", "--defined-only", str(object_file)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {line.split()[-1] for line in lines if line}


def build(folder: Path) -> None:
    """Build all of them into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for library, source in LIBRARIES.items():
        with tempfile.TemporaryDirectory() as scratch:
            ours, stubs, versions = (Path(scratch) / name for name in ("ours.o", "stubs.c", "versions"))
            compiler = ["g++", "-std=c++17", "-fPIC", "-O1", "-w"]
            subprocess.run([*compiler, *includes(), "-c", HERE / source, "-o", ours], check=True)
            missing = sorted(exported(library) - defined(ours))
            stubs.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in missing))
            link = [*compiler, "-shared", "-o", folder / library, ours, "-x", "c", "-fno-builtin", stubs]
            if library != "libcuda.so.1":  # symbols of the others have a version
                versions.write_text(f"{library} {{ global: *; }};\n")
                link.append(f"-Wl,--version-script={versions}")
            subprocess.run([*link, f"-Wl,-soname,{library}", "-ldl"], check=True)


def environment(folder: Path) -> dict[str, str]:
    """In which a process takes these libraries."""
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(str(folder / library) for library in LIBRARIES),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    build(Path(sys.argv[1]))
    print("built", *sorted(each.name for each in Path(sys.argv[1]).iterdir()))
