"""Reading files of weights. Nothing in them is executed: pickles may hold arrays, tensors and plain containers only."""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

WRAPPERS = ("model", "state_dict", "blobs")
"""Keys under which checkpoints keep their weights: both peers' training, others', and Caffe2."""


def read_state(file: str | Path) -> dict[str, Tensor]:
    """The tensors by name in a .safetensors file, a PyTorch checkpoint, or a .pkl of arrays (detectron2, Caffe2).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as weights, or holds anything else than arrays and plain containers.
    """
    file = Path(file)
    if file.is_dir():
        raise ValueError(f"{file} is a folder: give the file with the weights, such as its model.safetensors")
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: give a .safetensors, .pth or .pkl file")
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    content = _read_arrays(file) if file.suffix == ".pkl" else _read_torch(file)
    return _tensors(content, str(file))


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise _unreadable(file, error) from error


def _read_torch(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own message is a page, and tells how to run what is in the file
        reason = "it is damaged, or holds something else than tensors and plain containers"
        raise _unreadable(file, ValueError(reason)) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        raise _unreadable(file, error) from error


def _read_arrays(file: Path) -> Any:
    try:
        with file.open("rb") as stream:
            return _ArrayUnpickler(stream, encoding="latin1").load()  # Python 2 wrote the oldest of them
    except Exception as error:  # a damaged pickle can fail with nearly any exception, and none of them may pass as is
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> ValueError:
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(f"{file} cannot be read as weights ({first_line}): give .safetensors, .pth or .pkl")


def _tensors(content: Any, file: str) -> dict[str, Tensor]:
    """The state dict in a file's content, wherever its writer has put it."""
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if isinstance(content, Mapping):
        content = {name: _tensor(value) for name, value in content.items()}
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{file} holds no state dict of tensors: give the weights themselves")
    return {str(name): value for name, value in content.items()}


def _tensor(value: Any) -> Any:
    """A tensor of what is an array with numbers in it; anything else as it is."""
    return torch.from_numpy(value.numbers) if isinstance(value, _Array) and value.numbers is not None else value


class _Dtype:
    """What stands for numpy.dtype in a pickle: plain numbers only."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if not re.fullmatch(r"[fiu][1248]|b1", code):
            raise pickle.UnpicklingError(f"it holds an array of type {code}, and only numbers are read")
        self.numpy = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.numpy = self.numpy.newbyteorder(state[1])


class _Array:
    """What stands for numpy.ndarray in a pickle. NumPy's own way to restore one trusts its file; this does not."""

    numbers: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, in_fortran_order, data = state
        self.fill(data, dtype, shape, "F" if in_fortran_order else "C")

    def fill(self, data: Any, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> _Array:
        if not isinstance(data, (bytes, bytearray, memoryview, str)):
            raise pickle.UnpicklingError("it holds an array without bytes")
        raw = data.encode("latin-1") if isinstance(data, str) else bytes(data)  # Python 2 had no bytes
        array = np.frombuffer(raw, dtype.numpy).reshape(shape, order=order)
        self.numbers = np.array(array, array.dtype.newbyteorder("="), order="C")
        return self


def _encode(text: str, encoding: str) -> bytes:
    """Python 3 writes bytes as latin-1 text where a pickle has to be readable by Python 2."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding}")
    return text.encode("latin-1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}
for _core in ("core", "_core"):  # NumPy's own package, before and since version 2
    _ALLOWED |= {
        (f"numpy.{_core}.multiarray", "_reconstruct"): lambda kind, shape, code: _Array(),
        (f"numpy.{_core}.multiarray", "scalar"): lambda dtype, data: _Array().fill(data, dtype, (), "C"),
        (f"numpy.{_core}.numeric", "_frombuffer"): lambda *array: _Array().fill(*array),
    }


class _ArrayUnpickler(pickle.Unpickler):
    """Knows arrays and plain containers, and nothing else that a pickle could call."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, and only arrays are read")
        return _ALLOWED[module, name]
