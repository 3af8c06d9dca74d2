"""Proposals of an RPN that was trained apart: files beside the shards, and their way into a batch. Nothing of Ray.

For each shard there is a file of the same name with a row for each of its images, in its order, and beside them a
manifest.json. Plain Arrow types only, as in the shards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mrcnn.rpn import Proposals
from pipelines.manifest import FILE_NAME, Manifest, ShardInfo
from pipelines.scaling import Scaling
from pipelines.shards import ShardedRows
from pipelines.storage import Store, open_store

SCHEMA_VERSION = 1

PROPOSALS = pa.schema(
    [
        pa.field("image_id", pa.int64()),
        pa.field("boxes", pa.list_(pa.list_(pa.float32(), 4))),  # xyxy in pixels of the stored image, best first
        pa.field("scores", pa.list_(pa.float32())),  # objectness_logits
    ],
    metadata={"mrcnn.proposals_version": str(SCHEMA_VERSION)},
)


@dataclass(frozen=True)
class ProposalPlan:
    """All that the files' bytes depend on."""

    data_digest: str
    """Of the shards' manifest"""
    model_sha256: dict[str, str]
    """Of each file of the model"""
    top_n: int
    """Most proposals of an image"""
    schema_version: int = SCHEMA_VERSION

    def refuse_other(self, content: dict[str, Any], uri: str) -> None:
        """Raise ValueError unless the plan in `content`, found at a URI, is this one."""
        ours = asdict(self)
        different = [name for name in ours if content.get(name) != ours[name]]
        if different:
            raise ValueError(
                f"{uri} holds the proposals of another model or data set ({', '.join(different)} differ): "
                "remove it, or take another --run name"
            )


@dataclass(frozen=True)
class ProposalManifest:
    """manifest.json of a folder of proposals. Written last: a folder without one is not finished."""

    plan: ProposalPlan
    files: tuple[ShardInfo, ...]
    """In the order of the shards"""

    def write(self, store: Store) -> None:
        """Write manifest.json, whole or not at all."""
        store.write_bytes(FILE_NAME, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def read(cls, store: Store) -> ProposalManifest:
        """Read manifest.json. FileNotFoundError if there is none, ValueError if it is damaged."""
        try:
            content = json.loads(store.read_bytes(FILE_NAME))
            return cls(ProposalPlan(**content["plan"]), tuple(ShardInfo(**each) for each in content["files"]))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{store.uri_of(FILE_NAME)} is damaged ({type(error).__name__}): remove {store.uri} to propose again"
            ) from error


@dataclass(frozen=True)
class StoredProposals:
    """The proposals of one image, best first."""

    boxes: NDArray[np.float32]
    """(P, 4) xyxy in pixels of the stored image"""
    scores: NDArray[np.float32]
    """(P,) objectness_logits"""


class ProposalDataset:
    """The proposals for the rows of a data set, by the same numbers. Threads may share it.

    Raises FileNotFoundError where there are no finished proposals, ValueError where they are of another data set.
    """

    def __init__(self, uri: str, data: Manifest) -> None:
        store = open_store(uri)
        self.uri = store.uri
        self.manifest = ProposalManifest.read(store)
        self.top_n = self.manifest.plan.top_n
        if self.manifest.plan.data_digest != data.digest:
            raise ValueError(f"{uri} holds proposals for another data set: remove it to propose again")
        self._rows = ShardedRows(store, self.manifest.files, PROPOSALS)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> StoredProposals:
        """Proposals for the row of a number."""
        row = self._rows.read(index)
        boxes = row["boxes"].values.flatten().to_numpy()
        return StoredProposals(boxes.reshape(-1, 4), row["scores"].values.to_numpy())


def collate_proposals(
    found: Sequence[StoredProposals], scalings: Sequence[Scaling], *, flips: Sequence[bool], top_n: int
) -> Proposals:
    """Stack the proposals of images that were resized by `scalings` and then mirrored where `flips` says so.

    There are always `top_n` places: were there as many as the batch needs, what is sampled from an image would depend
    on the others.
    """
    boxes, scores = torch.zeros(len(found), top_n, 4), torch.zeros(len(found), top_n)
    valid = torch.zeros(len(found), top_n, dtype=torch.bool)
    for b, (each, scaling, flip) in enumerate(zip(found, scalings, flips, strict=True)):
        n = len(each.scores)
        scaled = each.boxes * np.array([scaling.x, scaling.y] * 2, np.float32)
        if flip:
            width = scaling.after[1]
            scaled = np.stack([width - scaled[:, 2], scaled[:, 1], width - scaled[:, 0], scaled[:, 3]], axis=1)
        boxes[b, :n] = torch.from_numpy(scaled)
        scores[b, :n] = torch.tensor(each.scores)
        valid[b, :n] = True
    return Proposals(boxes=boxes, scores=scores, valid=valid)
