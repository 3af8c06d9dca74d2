"""Shards -> proposals of an RPN, as a Ray Data pipeline over a pool of actors with the model.

One shard is one call of one actor, which writes the shard's file of proposals, then its receipt; only receipts travel
through Ray. A file with a receipt is not made again, so the same call completes what a killed one left.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from torch import Tensor

from mrcnn.preprocess import network_images
from mrcnn.weights import model_from_files
from pipelines.dataset import Row, ShardDataset
from pipelines.manifest import FILE_NAME, ShardInfo
from pipelines.patience import patiently
from pipelines.predict import READ_AHEAD, READ_THREADS, ModelFiles, model_pool, place_model
from pipelines.prefetch import prefetched
from pipelines.proposals import PROPOSALS, ProposalDataset, ProposalManifest, ProposalPlan
from pipelines.shards import write_shard
from pipelines.storage import Store, open_store

PROGRESS = "_progress"
PLAN = f"{PROGRESS}/plan.json"


def write_proposals(files: ModelFiles, dataset: ShardDataset, uri: str) -> ProposalDataset:
    """Write a model's proposals for all rows of a data set to a folder, or what is missing of them.

    As many for an image as training uses (rpn.post_nms_top_n_train). The model sees every image by itself, not
    mirrored, at the size that it is trained at. Ray must be running.

    Raises ValueError where the folder holds the proposals of another model or for another data set.
    """
    store = open_store(uri)
    config = model_from_files(files, "the RPN's model").config
    sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    plan = ProposalPlan(dataset.manifest.digest, sha256, config.rpn.post_nms_top_n_train)
    names = set(store.list())
    if FILE_NAME in names:
        plan.refuse_other(asdict(ProposalManifest.read(store).plan), store.uri)
    else:
        made = _resume(store, plan, names)
        missing = [i for i, shard in enumerate(dataset.manifest.shards) if shard.name not in made]
        made |= _run(missing, files, dataset, store)
        ProposalManifest(plan, tuple(made[shard.name] for shard in dataset.manifest.shards)).write(store)
    store.remove_folder(PROGRESS)
    return ProposalDataset(uri, dataset.manifest)


def _resume(store: Store, plan: ProposalPlan, names: set[str]) -> dict[str, ShardInfo]:
    """What is there already, by file name."""
    if PLAN in names:
        plan.refuse_other(json.loads(store.read_bytes(PLAN)), store.uri)
    elif any(name.endswith(".arrow") for name in names):
        raise ValueError(f"{store.uri} holds files of unknown origin: remove it, or take another --run name")
    store.write_bytes(PLAN, json.dumps(asdict(plan)).encode())
    finished = [name for name in names if name.endswith(".arrow") and _receipt_name(name) in names]
    return {name: ShardInfo(**json.loads(store.read_bytes(_receipt_name(name)))) for name in finished}


def _run(shards: list[int], files: ModelFiles, dataset: ShardDataset, store: Store) -> dict[str, ShardInfo]:
    if not shards:
        return {}
    tasks = ray.data.from_items([{"shard": i} for i in shards], override_num_blocks=len(shards))
    receipts = tasks.map_batches(
        ShardProposer,
        fn_constructor_args=(ray.put(dict(files)), dataset, store),
        batch_size=1,
        **model_pool(len(shards)).arguments,
    )
    infos = [ShardInfo(**json.loads(row["receipt"])) for row in receipts.iter_rows()]
    return {info.name: info for info in infos}


class ShardProposer:
    """Actor: loads the model once, then turns shards into files of proposals."""

    def __init__(self, files: ray.ObjectRef[ModelFiles], dataset: ShardDataset, store: Store) -> None:
        self.model = place_model(model_from_files(ray.get(files), "the RPN's model"))
        self.model.rpn.train()  # its head has no normalisation: this asks for as many proposals as training uses
        self.dataset, self.store = dataset, store

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        infos = [patiently(partial(self.propose, shard)) for shard in batch["shard"].tolist()]
        return {"receipt": [json.dumps(asdict(info)) for info in infos]}

    def propose(self, shard: int) -> ShardInfo:
        """Write the file of a shard, then its receipt."""
        name = self.dataset.manifest.shards[shard].name
        with self.store.new_file(name) as part:
            info = write_shard(part, self._rows(shard), PROPOSALS, name=name)
        self.store.write_bytes(_receipt_name(name), json.dumps(asdict(info)).encode())
        return info

    def _rows(self, shard: int) -> Iterator[dict[str, Any]]:
        numbers = self.dataset.numbers(shard)
        for row in prefetched(self.dataset.read, numbers, threads=READ_THREADS, ahead=READ_AHEAD):
            boxes, scores = self._of_image(row)
            yield {"image_id": row.image_id, "boxes": boxes.tolist(), "scores": scores.tolist()}

    @torch.no_grad()
    def _of_image(self, row: Row) -> tuple[Tensor, Tensor]:
        """Proposals (P, 4) in pixels of the stored image, and their objectness_logits (P,)."""
        images = network_images([row.image], self.model.config.input)
        height, width = images.sizes[0].tolist()
        found, _ = self.model.propose(images.to(next(self.model.parameters()).device))
        valid = found.valid[0].cpu()
        scale_y, scale_x = row.image.shape[0] / height, row.image.shape[1] / width
        boxes = found.boxes[0].cpu()[valid] * torch.tensor([scale_x, scale_y, scale_x, scale_y])
        return boxes, found.scores[0].cpu()[valid]


def _receipt_name(name: str) -> str:
    return f"{PROGRESS}/{name}.json"
