"""The built library: what is in it, what it needs, and what is said where it is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from mrcnn import ops
from mrcnn.ops import _library

OPERATORS = (
    "roi_mean",
    "roi_mean_backward",
    "roi_max",
    "roi_max_backward",
    "precise_roi_grad",
    "rle_roi_align",
    "nms",
)


def test_library_has_cuda_kernels_where_nvcc_is():
    if shutil.which("nvcc") is None or torch.version.cuda is None or os.environ.get("MRCNN_CUDA") == "0":
        pytest.skip("no nvcc, a torch without CUDA, or MRCNN_CUDA=0: the operators were built for the CPU only")
    assert ops.cuda_compiled()
    for operator in OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mrcnn::{operator}", "CUDA"), operator


def test_library_has_cpu_kernels():
    for operator in (*OPERATORS, "resize_masks", "enlarge_image"):  # the last two are for the building of data
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mrcnn::{operator}", "CPU"), operator


def test_missing_library_names_the_remedy(tmp_path):
    with pytest.raises(ImportError, match="pip install --no-build-isolation -e"):
        _library.load(tmp_path / "_C.abi3.so")
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match="do not load with torch"):
        _library.load(tmp_path / "_C.abi3.so")


def test_a_copy_without_its_library_takes_an_installed_one(tmp_path, monkeypatch):
    installed = tmp_path / "mrcnn/ops/_C.abi3.so"
    installed.parent.mkdir(parents=True)
    installed.touch()
    assert _library.find() == _library.LIBRARY != installed
    monkeypatch.syspath_prepend(tmp_path)
    assert _library.find() == _library.LIBRARY  # its own first
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "copy/_library.py"))
    assert _library.find() == installed


def test_import_needs_neither_gpu_nor_torch_python_symbols():
    """The library is plain: it must not drag in libtorch_python, so that any Python >= 3.11 loads it."""
    if sys.platform != "linux" or shutil.which("readelf") is None:
        pytest.skip("needs Linux and readelf")
    needed = subprocess.run(["readelf", "-d", str(_library.LIBRARY)], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in needed
    for library in ("libtorch_python", "libtorch_cuda", "libpython", "libcudart"):
        assert library not in needed
