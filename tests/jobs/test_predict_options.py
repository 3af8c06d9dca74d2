"""What the options of a prediction change in its rows: one chunk in this process, without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from models import SMALL

from mrcnn import Category, InputConfig, KeypointConfig, MaskConfig, MaskRCNN, load_model, save_model
from mrcnn.tta import TTAConfig, predict_with_tta
from mrcnn.weights import model_files
from pipelines import predict as predict_module
from pipelines.coco_file import coco_entries
from pipelines.inputs import Chunk, FileReader, Input
from pipelines.pixels import MAX_PIXELS
from pipelines.predict import ChunkPredictor, PredictSettings
from pipelines.predict_folder import write_model
from pipelines.predict_options import PredictOptions
from pipelines.storage import open_store
from pipelines.toy import ToySummary

SQUARE = 3  # id of a category


@pytest.fixture(autouse=True)
def _without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get_gpu_ids", list)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with random weights that takes toy images as they are."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = replace(SMALL, num_classes=3, input=InputConfig(shorter_side=96, longer_side=160))
    save_model(MaskRCNN(config, [Category(1, "circle"), Category(2, "triangle"), Category(SQUARE, "square")]), folder)
    return str(folder)


@pytest.fixture(scope="module")
def images(toy_data: ToySummary, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Some of the toy data, one that is broken, and one that is upright."""
    folder = tmp_path_factory.mktemp("images")
    for path in sorted(Path(toy_data.images_uri).iterdir())[:8]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "zz-broken.jpg").write_bytes(b"\xff\xd8\xff no jpeg")
    cv2.imwrite(str(folder / "tall.webp"), np.full((140, 90, 3), 127, np.uint8))
    return str(folder)


def predictor_for(
    files: dict[str, bytes], folder: str, out: Path, options: PredictOptions | None = None
) -> ChunkPredictor:
    """An actor, in this process."""
    settings = PredictSettings(
        FileReader(open_store(folder), MAX_PIXELS), open_store(str(out)), options or PredictOptions()
    )
    write_model(settings.out, files)
    return ChunkPredictor(settings)


def chunk_of(names: list[str]) -> Chunk:
    return Chunk(0, [Input(name, i) for i, name in enumerate(names, start=1)])


def parts_by(model: str, folder: str, out: Path, names: list[str], *all_options: PredictOptions) -> list[list[dict]]:
    """Rows that one chunk becomes with each of some options."""
    files = {path.name: path.read_bytes() for path in Path(model).iterdir()}
    found = []
    for number, options in enumerate(all_options):
        predictor_for(files, folder, out / str(number), options).predict(chunk_of(names))
        found.append(pq.read_table(out / str(number) / "predictions/part-00000.parquet").to_pylist())
    return found


def test_options_choose_among_detections(model: str, images: str, tmp_path: Path) -> None:
    names = sorted(open_store(images).list())[:3]
    (every,) = parts_by(model, images, tmp_path / "every", names, PredictOptions())
    scores = sorted(found["score"] for row in every for found in row["detections"])
    middle = (scores[len(scores) // 2] + scores[len(scores) // 2 - 1]) / 2
    high, best, squares = parts_by(
        model, images, tmp_path, names, PredictOptions(score_threshold=middle), PredictOptions(max_detections=2),
        PredictOptions(classes=("square",), max_detections=100),
    )  # fmt: skip
    for all_, above, two, of_class in zip(every, high, best, squares, strict=True):
        assert above["detections"] == [each for each in all_["detections"] if each["score"] > middle]
        assert two["detections"] == all_["detections"][:2]
        assert {each["category_id"] for each in of_class["detections"]} == {SQUARE}
        own = [each for each in all_["detections"] if each["category_id"] == SQUARE]
        assert of_class["detections"][: len(own)] == own
    assert sum(len(row["detections"]) for row in squares) > sum(
        each["category_id"] == SQUARE for row in every for each in row["detections"]
    ), "others have taken no place"


def test_batches_are_of_one_size_and_the_rows_stay_in_order(model: str, images: str, tmp_path: Path) -> None:
    names = sorted(open_store(images).list())  # a broken one among them
    one, four, again = parts_by(
        model,
        images,
        tmp_path,
        names,
        PredictOptions(),
        PredictOptions(batch_size=4),
        PredictOptions(batch_size=4),
    )
    assert four == again
    assert [row["image_id"] for row in one] == [row["image_id"] for row in four]
    for ours, theirs in zip(one, four, strict=True):
        scores = [[each["score"] for each in row["detections"][:5]] for row in (ours, theirs)]
        assert scores[1] == pytest.approx(scores[0], abs=1e-4)


def test_tta_is_the_librarys(model: str, images: str, tmp_path: Path) -> None:
    names = sorted(open_store(images).list())[:1]
    ((row,),) = parts_by(model, images, tmp_path, names, PredictOptions(tta=True))
    pixels = cv2.imread(f"{images}/{names[0]}")[:, :, ::-1].copy()
    (expected,) = predict_with_tta(load_model(model), [pixels], TTAConfig(scales=(72, 96, 120)))
    assert [each["score"] for each in row["detections"]] == pytest.approx(expected.scores.tolist(), abs=1e-6)


def test_keypoints_without_masks(toy_data: ToySummary, tmp_path: Path) -> None:
    torch.manual_seed(0)
    keypoint = KeypointConfig(num_keypoints=3, convs=1, channels=16)
    config = replace(SMALL, num_classes=2, mask=MaskConfig(head="none"), keypoint=keypoint)
    categories = [Category(4, "fish", ("left_eye", "right_eye", "mouth")), Category(9, "worm", ("mouth",))]
    names = sorted(open_store(toy_data.images_uri).list())[:3]
    files = model_files(MaskRCNN(config, categories))
    predictor = predictor_for(files, toy_data.images_uri, tmp_path)
    receipt = predictor.predict(chunk_of(names))
    assert (receipt.rows, receipt.rejected) == (3, [])
    assert {"reading", "decoding", "model", "masks", "writing"} <= receipt.seconds.keys()
    rows = pq.read_table(tmp_path / "predictions/part-00000.parquet").to_pylist()
    found = [each for row in rows for each in row["detections"]]
    assert {each["label"] for each in found} == {1, 2}
    assert all(each["rle"] is None for each in found)
    assert all(len(each["keypoints"]) == {4: 9, 9: 3}[each["category_id"]] for each in found)
    model = predictor.predictor.model
    first = model.predict([cv2.imread(f"{toy_data.images_uri}/{names[0]}")[:, :, ::-1].copy()])[0]
    points = first.keypoints[0].flatten()[: len(rows[0]["detections"][0]["keypoints"])]
    assert rows[0]["detections"][0]["keypoints"] == pytest.approx(points.tolist(), abs=0.5)
    entries = list(coco_entries(rows))
    assert len(entries) == len(found)
    assert all("segmentation" not in entry and entry["keypoints"] for entry in entries)
    without = predictor_for(files, toy_data.images_uri, tmp_path / "without", PredictOptions(keypoints="no"))
    without.predict(chunk_of(names))
    (table,) = (pq.read_table(path) for path in (tmp_path / "without/predictions").iterdir())
    assert all(each["keypoints"] is None for row in table.to_pylist() for each in row["detections"])


def test_what_is_written_slowly_is_not_read_far_ahead(
    model: str, images: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Backpressure: of forty images only some are in memory when the first rows are written."""
    read: list[str] = []
    seen: list[int] = []

    class Reader(FileReader):
        def read(self, item: Input, watch: Any) -> Any:
            read.append(item.name)
            return super().read(item, watch)

    class Writer(pq.ParquetWriter):
        def write_table(self, *args: Any, **kwargs: Any) -> None:
            seen.append(len(read))
            super().write_table(*args, **kwargs)

    monkeypatch.setattr(predict_module, "ROWS_A_GROUP", 2)
    monkeypatch.setattr(predict_module.pq, "ParquetWriter", Writer)
    settings = PredictSettings(Reader(open_store(images), MAX_PIXELS), open_store(str(tmp_path)), PredictOptions())
    write_model(settings.out, {path.name: path.read_bytes() for path in Path(model).iterdir()})
    names = sorted(open_store(images).list((".png", ".jpg")))[:4] * 10
    receipt = ChunkPredictor(settings).predict(chunk_of(names))
    assert (receipt.rows, len(read), len(seen)) == (40, 40, 20)
    assert seen[0] <= 14, "two rows, and four images and some more on either side of the model"


def test_tiles_of_a_large_image_give_rows_in_its_own_pixels(model: str, images: str, tmp_path: Path) -> None:
    large = np.random.default_rng(0).integers(0, 256, (250, 330, 3), np.uint8)
    cv2.imwrite(f"{tmp_path}/large.png", large)
    tiled, again = parts_by(model, str(tmp_path), tmp_path / "out", ["large.png"], *[PredictOptions(tile="128:32")] * 2)
    assert tiled == again
    (row,) = tiled
    assert (row["height"], row["width"]) == (250, 330)
    assert all(found["rle"]["size"] == [250, 330] for found in row["detections"])
    right = max(found["box"][0] + found["box"][2] for found in row["detections"])
    assert 128 < right <= 330
    names = sorted(open_store(images).list((".png",)))[:1]
    whole, fits = parts_by(model, images, tmp_path / "small", names, PredictOptions(), PredictOptions(tile="512"))
    assert whole == fits, "an image that fits into one tile is looked at as a whole"
