"""Proposals beside the shards: what the files hold, what is made again, and how they come into a batch."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash
from made_shards import make_shards
from made_shards import row as made_row
from models import SMALL

from mrcnn import MaskRCNN
from mrcnn.preprocess import network_images
from mrcnn.structures import Category
from mrcnn.weights import model_files
from pipelines import patience, propose
from pipelines.augment import Augmentation
from pipelines.dataset import ShardDataset
from pipelines.loader import Batch, batches
from pipelines.proposals import ProposalDataset, ProposalManifest, StoredProposals, collate_proposals
from pipelines.propose import PLAN, write_proposals
from pipelines.scaling import Scaling
from pipelines.storage import Store, open_store
from pipelines.storage_errors import UnreachableError

CONFIG = replace(
    SMALL,
    num_classes=4,
    rpn=replace(SMALL.rpn, post_nms_top_n_train=30, post_nms_top_n_test=10),
    input=replace(SMALL.input, shorter_side=64, longer_side=120),  # not the stored size
)
SHARD_NAMES = [f"shard-{i:05d}.arrow" for i in range(4)]


def make_model(seed: int = 0) -> MaskRCNN:
    torch.manual_seed(seed)
    return MaskRCNN(CONFIG, [Category(i, f"kind {i}") for i in range(1, 5)])


@pytest.fixture(scope="module")
def dataset(toy_shards: str) -> ShardDataset:
    return ShardDataset(toy_shards)


@pytest.fixture(scope="module")
def folder(dataset: ShardDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The proposals of `make_model()` for all rows of `dataset`."""
    folder = tmp_path_factory.mktemp("proposals") / "run-1-rpn"
    write_proposals(model_files(make_model()), dataset, str(folder))
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    for name in open_store(str(folder)).list():
        open_store(str(target)).write_bytes(name, (folder / name).read_bytes())
    return target


def take(dataset: ShardDataset, proposals: ProposalDataset, flip: float) -> Batch:
    how = Augmentation(flip)
    stream = batches(dataset, seed=3, global_batch=4, augmentation=how, network_input=CONFIG.input, proposals=proposals)
    with closing(stream):  # type: ignore[type-var]
        return next(stream)


def test_files_are_plain_arrow_in_the_order_of_the_shards(folder: Path, dataset: ShardDataset) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", *SHARD_NAMES]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["plan"]["data_digest"] == dataset.manifest.digest
    assert manifest["plan"]["top_n"] == 30
    model, row_number = make_model().eval(), 0
    model.rpn.train()  # as many as in training
    for info in manifest["files"]:
        data = (folder / info["name"]).read_bytes()
        assert (info["bytes"], info["xxh128"]) == (len(data), xxhash.xxh3_128(data).hexdigest())
        table = pa.ipc.open_file(data).read_all()
        box = pa.list_(pa.float32(), 4)
        assert table.schema.types == [pa.int64(), pa.list_(box), pa.list_(pa.float32())]
        assert table.num_rows == info["rows"]
        for found in table.to_pylist():
            row = dataset.read(row_number)
            images = network_images([row.image], CONFIG.input)
            with torch.no_grad():
                expected, _ = model.propose(images)
            assert found["image_id"] == row.image_id
            assert len(found["boxes"]) == int(expected.valid.sum()) > 10
            height, width = row.image.shape[:2]
            size = np.array([width, height] * 2) / images.sizes[0].flip(0).repeat(2).numpy()
            boxes = expected.boxes[expected.valid].numpy() * size
            np.testing.assert_allclose(found["boxes"], boxes, rtol=1e-5, atol=1e-3)
            np.testing.assert_allclose(found["scores"], expected.scores[expected.valid], rtol=1e-4, atol=1e-6)
            row_number += 1
    assert row_number == len(dataset)


@pytest.mark.parametrize(("owner", "name"), [(ShardDataset, "read"), (Store, "write_bytes")])
def test_a_storage_that_is_away_is_waited_for(
    tmp_path: Path, owner: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(propose.ray, "get", lambda reference: reference)
    monkeypatch.setattr(patience, "BETWEEN_TRIES", 0.01)
    made = ShardDataset(make_shards(tmp_path / "made", [made_row(i, (64, 80)) for i in range(3)]))
    files, away, works = model_files(make_model()), [1, 2], getattr(owner, name)

    def stumbling(self: object, *args: object) -> object:
        if away:
            away.pop()
            raise UnreachableError("s3://bucket cannot be reached")
        return works(self, *args)

    outs = [open_store(str(tmp_path / out)) for out in ("usual", "stumbling")]
    receipts = []
    for out in outs:
        receipts.append(propose.ShardProposer(files, made, out)({"shard": np.array([0])}))  # type: ignore[arg-type]
        monkeypatch.setattr(owner, name, stumbling)
    assert not away
    assert receipts[0] == receipts[1]
    assert outs[0].read_bytes(SHARD_NAMES[0]) == outs[1].read_bytes(SHARD_NAMES[0])


def test_a_killed_writing_is_completed_and_a_finished_one_left_alone(
    folder: Path, dataset: ShardDataset, tmp_path: Path
) -> None:
    out = copy_of(folder, tmp_path / "killed")
    before = ProposalManifest.read(open_store(str(out)))
    (out / "manifest.json").unlink()
    (out / SHARD_NAMES[1]).unlink()
    for info in (before.files[0], before.files[2]):  # the last file came without its receipt
        open_store(str(out)).write_bytes(f"_progress/{info.name}.json", json.dumps(asdict(info)).encode())
    open_store(str(out)).write_bytes(PLAN, json.dumps(asdict(before.plan)).encode())
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        ProposalDataset(str(out), dataset.manifest)

    times = {name: (out / name).stat().st_mtime_ns for name in (SHARD_NAMES[0], SHARD_NAMES[2], SHARD_NAMES[3])}
    found = write_proposals(model_files(make_model()), dataset, str(out))
    assert found.manifest == before  # the same bytes, too: their checksums are in it
    again = [name for name, time in times.items() if (out / name).stat().st_mtime_ns != time]
    assert again == [SHARD_NAMES[3]]
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", *SHARD_NAMES]

    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert write_proposals(model_files(make_model()), dataset, str(out)).manifest == before
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == times


def test_what_does_not_belong_together_is_refused(folder: Path, dataset: ShardDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"another model or data set \(model_sha256 differ\): remove it, or"):
        write_proposals(model_files(make_model(seed=1)), dataset, str(folder))
    other = replace(dataset.manifest, build={**dataset.manifest.build, "encoding": "png"})
    with pytest.raises(ValueError, match="holds proposals for another data set: remove it"):
        ProposalDataset(str(folder), other)
    unfinished = copy_of(folder, tmp_path / "unfinished")
    (unfinished / "manifest.json").unlink()
    with pytest.raises(ValueError, match="files of unknown origin"):
        write_proposals(model_files(make_model()), dataset, str(unfinished))
    open_store(str(unfinished)).write_bytes(PLAN, json.dumps({"data_digest": "d"}).encode())
    with pytest.raises(ValueError, match=r"another model or data set \(data_digest, model_sha256, top_n"):
        write_proposals(model_files(make_model()), dataset, str(unfinished))
    damaged = copy_of(folder, tmp_path / "damaged")
    (damaged / "manifest.json").write_text('{"plan": {}}')
    with pytest.raises(ValueError, match=r"manifest\.json is damaged \(TypeError\): remove"):
        ProposalDataset(str(damaged), dataset.manifest)


def test_proposals_are_resized_and_mirrored_with_their_image(folder: Path, dataset: ShardDataset) -> None:
    stored = ProposalDataset(str(folder), dataset.manifest)
    assert len(stored) == len(dataset)
    plain, mirrored = take(dataset, stored, flip=0.0), take(dataset, stored, flip=1.0)
    assert plain.proposals is not None
    assert mirrored.proposals is not None
    model = make_model().eval()
    model.rpn.train()
    rows = {dataset.read(i).image_id: dataset.read(i) for i in range(len(dataset))}
    assert plain.proposals.boxes.shape == (4, 30, 4)
    for b, image_id in enumerate(plain.image_ids):
        height, width = plain.images.sizes[b].tolist()
        assert (height, width) != rows[image_id].image.shape[:2]
        with torch.no_grad():  # what the RPN finds in the image as the network sees it
            expected, _ = model.propose(network_images([rows[image_id].image], CONFIG.input))
        for name in ("boxes", "scores"):
            torch.testing.assert_close(
                getattr(plain.proposals, name)[b], getattr(expected, name)[0], rtol=1e-4, atol=1e-3
            )
        assert torch.equal(plain.proposals.valid[b], expected.valid[0])
        valid = plain.proposals.valid[b]
        x1, y1, x2, y2 = plain.proposals.boxes[b][valid].unbind(1)
        assert torch.equal(mirrored.proposals.boxes[b][valid], torch.stack([width - x2, y1, width - x1, y2], 1))
        assert not mirrored.proposals.boxes[b][~valid].any()
    assert torch.equal(plain.proposals.scores, mirrored.proposals.scores)
    assert torch.equal(plain.proposals.valid, mirrored.proposals.valid)


def test_without_proposals_there_are_none(dataset: ShardDataset) -> None:
    stream = batches(dataset, seed=3, global_batch=4)
    with closing(stream):  # type: ignore[type-var]
        assert next(stream).proposals is None


def test_collated_by_hand() -> None:
    two = StoredProposals(np.array([[10, 20, 30, 60], [0, 0, 8, 8]], np.float32), np.array([2, -1], np.float32))
    none = StoredProposals(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
    scalings = [Scaling(before=(100, 200), after=(50, 400)), Scaling((10, 10), (10, 10))]
    found = collate_proposals([two, none], scalings, flips=[True, False], top_n=3)
    assert found.boxes[0].tolist() == [[340, 10, 380, 30], [384, 0, 400, 4], [0, 0, 0, 0]]
    assert found.scores.tolist() == [[2, -1, 0], [0, 0, 0]]
    assert found.valid.tolist() == [[True, True, False], [False, False, False]]
    assert not found.boxes[1].any()


def test_an_image_without_proposals_is_a_row(dataset: ShardDataset, tmp_path: Path) -> None:
    nothing = replace(CONFIG, rpn=replace(CONFIG.rpn, min_size=1e4))
    files = model_files(MaskRCNN(nothing, make_model().categories))
    found = write_proposals(files, dataset, str(tmp_path / "none")).read(7)
    assert found.boxes.shape == (0, 4)
    assert found.scores.shape == (0,)
