"""Reading files of weights: every format that is meant to be read, and nothing that could do harm."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from mrcnn.checkpoints import read_state

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32(2.5), "c": np.array([True, False])}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": x, "__author__": "them"}, lambda x: {"blobs": x}])
def test_pickled_arrays(tmp_path: Path, protocol: int, wrap: type) -> None:
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(wrap(OrderedDict(ARRAYS)), protocol))
    state = read_state(tmp_path / "w.pkl")
    assert state.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        assert np.array_equal(state[name].numpy(), value)


def test_arrays_in_fortran_order_and_of_the_other_byte_order(tmp_path: Path) -> None:
    given = {"f": np.asfortranarray(ARRAYS["a"]), "big": ARRAYS["a"].astype(">f4")}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(given, 5))
    for value in read_state(tmp_path / "w.pkl").values():
        assert np.array_equal(value.numpy(), ARRAYS["a"])


def test_what_python_2_wrote(tmp_path: Path) -> None:
    """A pickle as Caffe2's model zoo has it: names and data are byte strings, which need not be text."""
    numbers = np.array([-1.5, 3.25], np.float32)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x08" + numbers.tobytes() + b"tb"
    )
    (tmp_path / "old.pkl").write_bytes(b"\x80\x02}U\x07conv1_w" + array + b"s.")
    state = read_state(tmp_path / "old.pkl")
    assert list(state) == ["conv1_w"]
    assert np.array_equal(state["conv1_w"].numpy(), numbers)


class Evil:
    """Unpickling it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("suffix", ["pkl", "pth"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, suffix: str) -> None:
    content = {"model": ARRAYS, "other": Evil(tmp_path / "made")}
    (tmp_path / f"evil.{suffix}").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(ValueError, match=rf"evil\.{suffix} cannot be read as weights"):
        read_state(tmp_path / f"evil.{suffix}")
    assert not (tmp_path / "made").exists()


def test_the_refused_class_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.pkl").write_bytes(pickle.dumps({"a": Path("/")}))
    with pytest.raises(ValueError, match=r"it holds pathlib\S*\.\w*Path, and only arrays are read"):
        read_state(tmp_path / "p.pkl")


@pytest.mark.parametrize("length", [0, 1, 20, -40, -1])
def test_a_cut_pickle_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps(ARRAYS)[:length])
    with pytest.raises(ValueError, match=r"cut\.pkl cannot be read as weights"):
        read_state(tmp_path / "cut.pkl")


@pytest.mark.parametrize("content", [b"<html>404</html>", b"\x80\x02", b"\xff" * 64, b"PK\x03\x04" + b"\0" * 60])
@pytest.mark.parametrize("suffix", ["pkl", "pth", "safetensors"])
def test_what_holds_no_weights_is_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    (tmp_path / f"x.{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_state(tmp_path / f"x.{suffix}")


@pytest.mark.parametrize("content", [{}, [1, 2], "text", {"a": "text"}, {"model": {}}, {"a": None}])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="holds no state dict of tensors"):
        read_state(tmp_path / "x.pkl")


@pytest.mark.parametrize(
    "array", [np.array(["x"]), np.array([None]), np.zeros(2, "f4,i8"), np.zeros(2, complex), np.zeros(2, np.longdouble)]
)
def test_arrays_of_anything_but_numbers_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": array}))
    with pytest.raises(ValueError, match=r"it holds an array of type .*, and only numbers are read"):
        read_state(tmp_path / "x.pkl")


def test_an_array_that_claims_more_than_its_data_is_refused(tmp_path: Path) -> None:
    content = pickle.dumps({"a": np.zeros((2, 3), np.float32)}, 4).replace(b"K\x02K\x03\x86", b"K\xffK\x03\x86")
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read as weights \(cannot reshape"):
        read_state(tmp_path / "x.pkl")


def test_a_training_checkpoint_gives_its_model(tmp_path: Path) -> None:
    state = {"w": torch.ones(2)}
    torch.save({"model": state, "optimizer": {"state": {}, "lr": 0.1}, "iteration": 7}, tmp_path / "w.pth")
    assert torch.equal(read_state(tmp_path / "w.pth")["w"], state["w"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pkl does not exist"):
        read_state(tmp_path / "none.pkl")
