"""Builds the compiled operators; everything else about the package is in pyproject.toml.

One extension, `mrcnn/ops/_C.abi3.so`, against torch's stable ABI: it loads on every torch >= 2.11 and every
Python >= 3.11. It has CUDA kernels where `nvcc` is found and fits torch, and CPU kernels always.

    MRCNN_CUDA=0|1         never, or by all means (fails where that cannot be), build the CUDA kernels
    TORCH_CUDA_ARCH_LIST   GPU architectures, "8.0;8.6;9.0+PTX" by default
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from setuptools import Extension, setup

CSRC = Path("mrcnn/ops/csrc")
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11
ARCHITECTURES = "8.0;8.6;9.0+PTX"


class Toolkit(NamedTuple):
    """A CUDA toolkit: where it is and its version."""

    home: Path
    version: str


def find_toolkit() -> Toolkit | None:
    """The toolkit of CUDA_HOME's or the PATH's nvcc, which may be a link or a script but knows its home."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    if nvcc is None:
        return None
    plan = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    release = re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if top is None or release is None:
        return None
    return Toolkit(Path(top[1].strip()).resolve(), release[1])


def choose_toolkit() -> Toolkit | None:
    """The toolkit to build with, None for CPU kernels only; says which, and why."""
    wish = os.environ.get("MRCNN_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"mrcnn.ops: MRCNN_CUDA={wish!r} is neither 0 nor 1")
    toolkit, reason = find_toolkit(), ""
    if wish == "0":
        reason = "MRCNN_CUDA=0"
    elif toolkit is None:
        reason = "no nvcc in CUDA_HOME or on the PATH"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} has no CUDA"
    elif torch.version.cuda.split(".")[0] != toolkit.version.split(".")[0]:
        reason = f"nvcc is {toolkit.version} but torch {torch.__version__} is for CUDA {torch.version.cuda}"
    if reason and wish == "1":
        raise SystemExit(f"mrcnn.ops: MRCNN_CUDA=1, but {reason}")
    if reason or toolkit is None:
        print(f"mrcnn.ops: building CPU kernels only ({reason})", file=sys.stderr)
        return None
    print(
        f"mrcnn.ops: building CPU and CUDA kernels (nvcc {toolkit.version} at {toolkit.home})",
        file=sys.stderr,
    )
    return toolkit


TOOLKIT = choose_toolkit()
if TOOLKIT is not None:  # read when torch.utils.cpp_extension is imported
    os.environ["CUDA_HOME"] = str(TOOLKIT.home)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)

from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths  # noqa: E402


def sources(pattern: str) -> list[str]:
    return sorted(str(path) for path in CSRC.rglob(pattern))


def extension(toolkit: Toolkit | None) -> Extension:
    """The one extension. It links neither libtorch_python nor libtorch_cuda, and the CUDA runtime statically:
    a build with CUDA also loads where there is no GPU, driver, toolkit or CUDA build of torch."""
    files, cxx = sources("*.cpp"), ["-O3", "-std=c++20", "-fvisibility=hidden", TORCH_TARGET]
    nvcc: list[str] = []
    libraries, folders, link = ["c10", "torch_cpu"], library_paths(), []
    if toolkit is not None:
        major, minor = toolkit.version.split(".")[:2]
        files += sources("*.cu")
        cxx.append(f"-DMRCNN_CUDA_VERSION={int(major) * 1000 + int(minor) * 10}")
        nvcc = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden", "--threads=2", TORCH_TARGET]
        libraries += ["cudart_static", "rt", "pthread", "dl"]
        link = ["-Wl,--no-as-needed", "-ltorch"]  # brings libtorch_cuda if there is one: see cuda/launch.h
        folders = [*folders, str(toolkit.home / "lib64"), str(toolkit.home / "lib")]
    return Extension(
        "mrcnn.ops._C",
        files,
        include_dirs=include_paths(),
        library_dirs=folders,
        libraries=libraries,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
        depends=sources("*.h"),
        language="c++",
        py_limited_api=True,
    )


setup(
    ext_modules=[extension(TOOLKIT)],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
