"""Checkpoints: a folder `step-00001000` with safetensors and JSON, whole or not there at all.

`checkpoint.json` is written last and holds the digest of every other file: a folder without it is not a checkpoint, and
one whose digests differ is never loaded: training goes on from the one before. Nothing is pickled. What a checkpoint
holds is all that training needs to go on: the schedule is a function of the step, the order of images and all
randomness a function of (seed, images seen).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from jobs.engine import Engine
from mrcnn.model import MaskRCNN
from mrcnn.weights import WEIGHTS_FILE, model_files, state_bytes
from pipelines.patience import patiently
from pipelines.storage import Store, open_store

OPTIMIZER_FILE, MANIFEST_FILE = "optimizer.safetensors", "checkpoint.json"
REFUSED_FILE = "refused.json"  # the manifest of a damaged checkpoint, which is none any more
FORMAT = "mrcnn-checkpoint-1"


class WrongFormatError(ValueError):
    """A checkpoint is whole, but another version of this package has written it."""


class DamagedCheckpointError(ValueError):
    """A checkpoint is not what was written: a part is missing, torn or changed."""


@dataclass(frozen=True)
class Progress:
    """How far a training, or a phase of one, is, and of what."""

    step: int
    """Optimizer steps done."""
    images_seen: int
    """Images consumed by all workers together."""
    seed: int
    """Of the run: with it and the phase, images_seen fixes the place in the stream of batches."""
    data_digest: str
    """Of the training shards' manifest."""


class Checkpoints:
    """The checkpoints of one run, below `<storage>/<run>/checkpoints`, or of one of its phases."""

    def __init__(self, run_uri: str) -> None:
        self.store: Store = open_store(f"{run_uri}/checkpoints")

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        pattern = re.compile(rf"step-(\d+)/{re.escape(MANIFEST_FILE)}")
        return sorted(int(found[1]) for name in self.store.list((MANIFEST_FILE,)) if (found := pattern.fullmatch(name)))

    def save(self, model: MaskRCNN, engine: Engine, progress: Progress, *, keep: int) -> str:
        """Write a checkpoint and remove all but the newest `keep`. Returns its URI.

        Waits for a storage that does not answer. Raises ValueError where it cannot be written, as on a full disk: then
        there is nothing of it.
        """
        folder = self.store.join(_folder(progress.step))
        files = {
            **model_files(model),
            OPTIMIZER_FILE: state_bytes(_momentum(model, engine.optimizer)),
        }
        manifest = {
            "format": FORMAT,
            "progress": asdict(progress),
            "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        }
        try:
            patiently(lambda: _write(folder, files, manifest))
        except ValueError:
            with suppress(ValueError):  # what could not be written whole only takes room
                self.store.remove_folder(_folder(progress.step))
            raise
        patiently(lambda: self._prune(keep))
        return folder.uri

    def restore_newest(self, model: MaskRCNN, engine: Engine) -> int:
        """Load the newest checkpoint that is what was written. Returns its step, 0 without any checkpoint.

        Damaged ones are told and put aside. For one process: it decides for the others. Raises ValueError if all of
        them are damaged, or the newest is of another model or format.
        """
        damaged: list[int] = []
        for step in reversed(patiently(self.steps)):
            try:
                self.restore(model, engine, step)
            except DamagedCheckpointError as error:
                print(f"warning: {error}: going on from the checkpoint before", flush=True)
                damaged.append(step)
                continue
            self._put_aside(damaged)
            return step
        if damaged:
            raise ValueError(f"no checkpoint in {self.store.uri} is what was written: start a new run")
        return 0

    def restore(self, model: MaskRCNN, engine: Engine, step: int) -> Progress:
        """Load a checkpoint into a model and its engine.

        Raises DamagedCheckpointError, before anything is loaded, if a file of it is not what was written; ValueError if
        it is of another model or format.
        """
        files, progress = patiently(lambda: self._read(step))
        _load_model(model, load(files[WEIGHTS_FILE]), self.store.uri_of(_folder(step)))
        _set_momentum(model, engine.optimizer, load(files[OPTIMIZER_FILE]))
        engine.step = progress.step
        return progress

    def _read(self, step: int) -> tuple[dict[str, bytes], Progress]:
        """All files of a checkpoint but its manifest, which they are compared with."""
        folder = self.store.join(_folder(step))
        digests, progress = self._manifest(step)
        try:
            files = {name: folder.read_bytes(name) for name in digests}
        except FileNotFoundError as error:
            raise DamagedCheckpointError(str(error)) from error
        for name, data in files.items():
            if hashlib.sha256(data).hexdigest() != digests[name]:
                raise DamagedCheckpointError(f"{folder.uri_of(name)} is not what was written")
        return files, progress

    def _manifest(self, step: int) -> tuple[dict[str, str], Progress]:
        """Digests by file name, and how far it is."""
        name = f"{_folder(step)}/{MANIFEST_FILE}"
        data = self.store.read_bytes(name)
        try:
            manifest = json.loads(data)
            if manifest["format"] != FORMAT:
                raise WrongFormatError(f"{self.store.uri_of(name)} is not of format {FORMAT!r}: start a new run")
            digests, progress = manifest["sha256"], Progress(**manifest["progress"])
            is_whole = digests.keys() >= {WEIGHTS_FILE, OPTIMIZER_FILE} and progress.step == step
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpointError(f"{self.store.uri_of(name)} is not what was written ({error!r})") from error
        if not is_whole:
            raise DamagedCheckpointError(f"{self.store.uri_of(name)} is not what was written")
        return digests, progress

    def _put_aside(self, damaged: Sequence[int]) -> None:
        """Kept to be looked at, but none any more: a damaged one that stays the newest would push out good ones."""
        for step in damaged:
            folder = self.store.join(_folder(step))
            patiently(partial(folder.write_bytes, REFUSED_FILE, folder.read_bytes(MANIFEST_FILE)))
            patiently(partial(folder.remove, MANIFEST_FILE))

    def _prune(self, keep: int) -> None:
        for step in self.steps()[:-keep]:
            # its manifest first, so that a half-removed checkpoint is none
            self.store.remove(f"{_folder(step)}/{MANIFEST_FILE}")
            self.store.remove_folder(_folder(step))


def _folder(step: int) -> str:
    return f"step-{step:08d}"


def _write(folder: Store, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
    folder.remove_leftovers()  # of a writer that was killed here
    if folder.exists(MANIFEST_FILE):  # of a run that went on from an earlier one; while it is replaced, it is none
        folder.remove(MANIFEST_FILE)
    for name, data in files.items():
        folder.write_bytes(name, data)
    folder.write_bytes(MANIFEST_FILE, json.dumps(manifest, indent=2).encode())


def _load_model(model: nn.Module, state: dict[str, Tensor], uri: str) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{uri} is of another model ({str(error).splitlines()[-1].strip()}): "
            "resume with the settings of the run, or start a new one"
        ) from error


def _momentum(model: nn.Module, optimizer: torch.optim.SGD) -> dict[str, Tensor]:
    """SGD's only state, by parameter name."""
    buffers = {}
    for name, parameter in model.named_parameters():
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            buffers[name] = buffer
    return buffers


def _set_momentum(model: nn.Module, optimizer: torch.optim.SGD, buffers: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in buffers:
            optimizer.state[parameter]["momentum_buffer"] = buffers[name].to(parameter.device)
