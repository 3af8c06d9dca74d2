"""Checkpoints: a folder `step-00001000` with safetensors and JSON, whole or not there at all.

`checkpoint.json` is written last and holds the digest of every other file: a folder without it is not a checkpoint, and
one whose digests differ is refused. Nothing is pickled. What a checkpoint holds is all that training needs to go on:
the schedule is a function of the step, the order of images and all randomness a function of (seed, images seen).
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from jobs.engine import Engine
from mrcnn.model import MaskRCNN
from mrcnn.weights import WEIGHTS_FILE, model_files, state_bytes
from pipelines.storage import Store, open_store

OPTIMIZER_FILE, MANIFEST_FILE = "optimizer.safetensors", "checkpoint.json"
FORMAT = "mrcnn-checkpoint-1"


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
        """Write a checkpoint and remove all but the newest `keep`. Returns its URI."""
        folder = self.store.join(_folder(progress.step))
        files = {
            **model_files(model),
            OPTIMIZER_FILE: state_bytes(_momentum(model, engine.optimizer)),
        }
        for name, data in files.items():
            folder.write_bytes(name, data)
        manifest = {
            "format": FORMAT,
            "progress": asdict(progress),
            "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        }
        folder.write_bytes(MANIFEST_FILE, json.dumps(manifest, indent=2).encode())
        self._prune(keep)
        return folder.uri

    def restore(self, model: MaskRCNN, engine: Engine, step: int) -> Progress:
        """Load a checkpoint into a model and its engine.

        Raises ValueError if a file of it is not what was written, or does not fit the model.
        """
        folder = self.store.join(_folder(step))
        manifest = self._manifest(step)
        files = {name: folder.read_bytes(name) for name in manifest["sha256"]}
        for name, data in files.items():
            if hashlib.sha256(data).hexdigest() != manifest["sha256"][name]:
                raise ValueError(
                    f"{folder.uri_of(name)} is not what was written: remove {folder.uri} to go on from the one before"
                )
        _load_model(model, load(files[WEIGHTS_FILE]), folder.uri)
        _set_momentum(model, engine.optimizer, load(files[OPTIMIZER_FILE]))
        progress = Progress(**manifest["progress"])
        engine.step = progress.step
        return progress

    def _manifest(self, step: int) -> dict[str, Any]:
        name = f"{_folder(step)}/{MANIFEST_FILE}"
        try:
            manifest = json.loads(self.store.read_bytes(name))
        except ValueError as error:
            raise ValueError(f"{self.store.uri_of(name)} is not JSON: remove its folder") from error
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{self.store.uri_of(name)} is not of format {FORMAT!r}: start a new run")
        return manifest

    def _prune(self, keep: int) -> None:
        for step in self.steps()[:-keep]:
            # its manifest first, so that a half-removed checkpoint is none
            self.store.remove(f"{_folder(step)}/{MANIFEST_FILE}")
            self.store.remove_folder(_folder(step))


def _folder(step: int) -> str:
    return f"step-{step:08d}"


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
