"""Checkpoints: a folder `step-00001000` with safetensors and JSON, whole or not there at all.

`checkpoint.json` is written last and holds the digest of every other file: a folder without it is not a checkpoint, and
one whose digests differ is never loaded: training goes on from the one before. Nothing is pickled. What a checkpoint
holds is all that training needs to go on: the schedule is a function of the step, the order of images and all
randomness a function of (seed, images seen).

A checkpoint that is to be evaluated says so by a file `to-evaluate` from its first moment on, and is due until there is
`evaluation.json` beside it, whoever writes that and however often its writer is killed before. `best.json` beside the
folders names the best one. The newest ones, the best one and those that are due stay.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from jobs.engine import Engine
from mrcnn.model import MaskRCNN
from mrcnn.weights import CONFIG_FILE, WEIGHTS_FILE, model_files, state_bytes
from pipelines.patience import patiently
from pipelines.storage import Store, open_store

OPTIMIZER_FILE, MANIFEST_FILE = "optimizer.safetensors", "checkpoint.json"
REFUSED_FILE = "refused.json"  # the manifest of a damaged checkpoint, which is none any more
EVALUATE_FILE, EVALUATION_FILE, BEST_FILE = "to-evaluate", "evaluation.json", "best.json"
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


@dataclass(frozen=True)
class Best:
    """The best checkpoint of a run so far."""

    step: int
    """Of the run"""
    measure: str
    """What it is the best by, as val/mask_AP"""
    value: float
    checkpoint: str
    """Name of its folder, beside the file that says so"""


class Checkpoints:
    """The checkpoints of one run, below `<storage>/<run>/checkpoints`, or of one of its phases."""

    def __init__(self, run_uri: str) -> None:
        self.store: Store = open_store(f"{run_uri}/checkpoints")

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return list(self._complete())

    def due(self) -> list[int]:
        """Steps of those that are to be evaluated and are not yet, ascending."""
        return [step for step, files in self._complete().items() if _is_due(files)]

    def uri(self, step: int) -> str:
        """Folder of a checkpoint, which is a model's, too."""
        return self.store.uri_of(_folder(step))

    def save(self, model: MaskRCNN, engine: Engine, progress: Progress, *, keep: int, to_evaluate: bool = False) -> str:
        """Write a checkpoint and remove what `prune` does. Returns its URI.

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
        if to_evaluate:
            files[EVALUATE_FILE] = b"{}\n"
        try:
            patiently(lambda: _write(folder, files, manifest))
        except ValueError:
            with suppress(ValueError):  # what could not be written whole only takes room
                self.store.remove_folder(_folder(progress.step))
            raise
        patiently(lambda: self.prune(keep))
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
        _load_model(model, load(files[WEIGHTS_FILE]), self.uri(step))
        _set_momentum(model, engine.optimizer, load(files[OPTIMIZER_FILE]))
        engine.step = progress.step
        return progress

    def read_model(self, step: int) -> dict[str, bytes]:
        """The files of a checkpoint's model, and none of the optimizer's. Raises DamagedCheckpointError."""

        def read() -> dict[str, bytes]:
            digests, _ = self._manifest(step)
            return self._verified(step, {name: digests[name] for name in (WEIGHTS_FILE, CONFIG_FILE)})

        return patiently(read)

    def mark_to_evaluate(self, step: int) -> None:
        """From now on a checkpoint is due, if it is not evaluated already."""
        patiently(lambda: self.store.write_bytes(f"{_folder(step)}/{EVALUATE_FILE}", b"{}\n"))

    def write_evaluation(self, step: int, content: Mapping[str, Any]) -> None:
        """What came of the evaluation of a checkpoint, which is not due any more."""
        data = json.dumps(content, indent=1, allow_nan=False).encode()
        patiently(lambda: self.store.write_bytes(f"{_folder(step)}/{EVALUATION_FILE}", data))

    def forget_evaluation(self, step: int) -> None:
        """Where a checkpoint is still there and evaluated, its evaluation is due again."""
        if EVALUATION_FILE in self._complete().get(step, ()):
            self.store.remove(f"{_folder(step)}/{EVALUATION_FILE}")

    def best(self) -> Best | None:
        """The best checkpoint, if one was evaluated."""
        if not self.store.exists(BEST_FILE):
            return None
        return Best(**json.loads(self.store.read_bytes(BEST_FILE)))

    def name_best(self, step: int, *, step_of_run: int, measure: str, value: float) -> None:
        """Say which one is the best: it stays."""
        data = json.dumps(asdict(Best(step_of_run, measure, value, _folder(step))), indent=1).encode()
        patiently(lambda: self.store.write_bytes(BEST_FILE, data))

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep`, the best one, and those that are due."""
        complete = self._complete()  # before the best: one that is not due any more may have become it
        old = list(complete)[:-keep]
        best = self.best() if old else None
        for step in old:
            if not _is_due(complete[step]) and (best is None or best.checkpoint != _folder(step)):
                # its manifest first, so that a half-removed checkpoint is none
                self.store.remove(f"{_folder(step)}/{MANIFEST_FILE}")
                self.store.remove_folder(_folder(step))

    def _complete(self) -> dict[int, set[str]]:
        """The complete checkpoints by their steps, ascending: which of the files that tell their state there are."""
        pattern = re.compile(r"step-(\d+)/([^/]+)")
        found: dict[int, set[str]] = {}
        for name in self.store.list((MANIFEST_FILE, EVALUATE_FILE, EVALUATION_FILE)):
            if match := pattern.fullmatch(name):
                found.setdefault(int(match[1]), set()).add(match[2])
        return {step: found[step] for step in sorted(found) if MANIFEST_FILE in found[step]}

    def _read(self, step: int) -> tuple[dict[str, bytes], Progress]:
        """All files of a checkpoint but its manifest, which they are compared with."""
        digests, progress = self._manifest(step)
        return self._verified(step, digests), progress

    def _verified(self, step: int, digests: Mapping[str, str]) -> dict[str, bytes]:
        folder = self.store.join(_folder(step))
        try:
            files = {name: folder.read_bytes(name) for name in digests}
        except FileNotFoundError as error:
            raise DamagedCheckpointError(str(error)) from error
        for name, data in files.items():
            if hashlib.sha256(data).hexdigest() != digests[name]:
                raise DamagedCheckpointError(f"{folder.uri_of(name)} is not what was written")
        return files

    def _manifest(self, step: int) -> tuple[dict[str, str], Progress]:
        """Digests by file name, and how far it is."""
        name = f"{_folder(step)}/{MANIFEST_FILE}"
        data = self.store.read_bytes(name)
        try:
            manifest = json.loads(data)
            if manifest["format"] != FORMAT:
                raise WrongFormatError(f"{self.store.uri_of(name)} is not of format {FORMAT!r}: start a new run")
            digests, progress = manifest["sha256"], Progress(**manifest["progress"])
            is_whole = digests.keys() >= {WEIGHTS_FILE, CONFIG_FILE, OPTIMIZER_FILE} and progress.step == step
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


def load_model_files(model: nn.Module, files: Mapping[str, bytes], uri: str) -> None:
    """Load what `Checkpoints.read_model` of the checkpoint at `uri` has read. Raises ValueError for another model's."""
    _load_model(model, load(files[WEIGHTS_FILE]), uri)


def _is_due(files: Collection[str]) -> bool:
    return EVALUATE_FILE in files and EVALUATION_FILE not in files


def _folder(step: int) -> str:
    return f"step-{step:08d}"


def _write(folder: Store, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
    folder.remove_leftovers()  # of a writer that was killed here
    for name in (MANIFEST_FILE, EVALUATE_FILE, EVALUATION_FILE):  # of a run that went on from an earlier one
        if folder.exists(name):  # the manifest first: while the checkpoint is replaced, it is none
            folder.remove(name)
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
