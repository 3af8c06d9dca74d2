"""Batch inference over real processes: what it writes, what it leaves alone, what it refuses."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from models import SMALL
from pycocotools import mask as coco_mask

from jobs.evaluate import judge_rows, metrics_of
from jobs.predict import PredictSummary, predict, prepare, run_prediction
from mrcnn import InputConfig, MaskRCNN, load_model, save_model
from mrcnn.evaluation import evaluate_coco
from pipelines.dataset import ShardDataset
from pipelines.predict import PREDICTIONS
from pipelines.predict_folder import PLAN, _receipts_of, receipt_name, write_receipt
from pipelines.predict_options import PredictOptions, PredictRun
from pipelines.sources.names import image_ids
from pipelines.storage import open_store
from pipelines.toy import ToySummary

DRAWN = PredictRun(overlays=3, coco_results=True)
BROKEN = "zz-broken.jpg"
IMAGES = 18  # 16 of the toy data, one that is broken and one below a folder: two chunks


@pytest.fixture(scope="module")
def model(toy_shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with random weights that takes toy images as they are."""
    folder, categories = tmp_path_factory.mktemp("model"), ShardDataset(toy_shards).categories
    torch.manual_seed(0)
    config = replace(SMALL, num_classes=len(categories), input=InputConfig(shorter_side=96, longer_side=160))
    save_model(MaskRCNN(config, categories), folder)
    return str(folder)


@pytest.fixture(scope="module")
def images(toy_data: ToySummary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    shutil.copytree(toy_data.images_uri, folder, dirs_exist_ok=True)
    (folder / BROKEN).write_bytes(b"\xff\xd8\xff no jpeg")
    (folder / "notes.txt").write_text("no image")
    (folder / "00").mkdir()
    cv2.imwrite(str(folder / "00" / "tall.webp"), np.full((140, 90, 3), 127, np.uint8))
    return folder


@pytest.fixture(scope="module")
def first(
    model: str, images: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PredictSummary, Path]:
    """One prediction, and where it is."""
    out = tmp_path_factory.mktemp("predictions")
    return predict(model, str(images), str(out), run=DRAWN), out


def rows(out: Path) -> list[dict]:
    parts = sorted((out / "predictions").glob("*.parquet"))
    assert [p.name for p in parts] == ["part-00000.parquet", "part-00001.parquet"]
    assert all(pq.read_schema(part).equals(PREDICTIONS) for part in parts)
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def snapshot(out: Path) -> dict[str, bytes]:
    """All files and what is in them."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_every_image_is_a_row_or_a_reject(first: tuple[PredictSummary, Path], images: Path) -> None:
    summary, out = first
    found = rows(out)
    rejects = pq.read_table(out / "rejects.parquet").to_pylist()
    assert (summary.images, summary.images_made, summary.overlays) == (IMAGES, IMAGES, 3)
    assert [(r["uri"], r["stage"]) for r in rejects] == [(str(images / BROKEN), "decode")]
    assert len(found) == IMAGES - 1
    names = [str(Path(r["uri"]).relative_to(images)) for r in found + rejects]
    assert [r["image_id"] for r in found + rejects] == image_ids(names)
    assert len(set(names)) == IMAGES
    assert [r["uri"] for r in found] == sorted(r["uri"] for r in found)
    assert summary.detections == sum(len(r["detections"]) for r in found) > 0
    assert "18 images, 1 rejects" in str(summary)
    assert "images/s" in str(summary)
    tall = found[0]
    assert (tall["uri"], tall["height"], tall["width"]) == (str(images / "00/tall.webp"), 140, 90)


def test_rows_are_the_models_answers(first: tuple[PredictSummary, Path], model: str) -> None:
    row = rows(first[1])[5]
    bgr = cv2.imread(row["uri"])
    (expected,) = load_model(model).predict([np.ascontiguousarray(bgr[:, :, ::-1])])
    assert len(row["detections"]) == len(expected) > 0
    for i, found in enumerate(row["detections"]):
        x1, y1, x2, y2 = expected.boxes[i].tolist()
        assert found["box"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1e-3)
        assert found["label"] == int(expected.labels[i])
        assert found["score"] == pytest.approx(float(expected.scores[i]), abs=1e-5)
        assert coco_mask.decode(found["rle"]).shape == (row["height"], row["width"])
        assert found["keypoints"] is None


def test_the_average_precision_is_evaluates(
    first: tuple[PredictSummary, Path], model: str, toy_data: ToySummary, toy_shards: str
) -> None:
    truth = json.loads(Path(toy_data.annotations_uri).read_text())
    by_name = {image["file_name"]: image["id"] for image in truth["images"]}
    ids = {row["image_id"]: by_name.get(Path(row["uri"]).name) for row in rows(first[1])}
    results = json.loads((first[1] / "coco_results.json").read_text())
    assert len(results) == first[0].detections
    results = [{**r, "image_id": ids[r["image_id"]]} for r in results if ids[r["image_id"]] is not None]
    dataset = ShardDataset(toy_shards)
    judged = judge_rows(load_model(model), dataset, range(len(dataset)))
    ours, theirs = evaluate_coco(truth, results), metrics_of(judged, dataset.categories)
    assert ours.box == pytest.approx(theirs.box, abs=1e-6, nan_ok=True)
    assert ours.mask == pytest.approx(theirs.mask, abs=1e-6, nan_ok=True)


def test_the_manifest_says_what_made_it(first: tuple[PredictSummary, Path], model: str) -> None:
    manifest = json.loads((first[1] / "manifest.json").read_text())
    assert manifest["totals"] == {
        "images": IMAGES,
        "rows": IMAGES - 1,
        "rejects": 1,
        "detections": first[0].detections,
    }
    assert manifest["model"]["uri"] == model
    assert len(manifest["plan"]["model_sha256"]["model.safetensors"]) == 64
    assert manifest["categories"][0]["name"] == "circle"
    assert not (first[1] / "_progress").exists()


def test_the_first_images_are_drawn(first: tuple[PredictSummary, Path]) -> None:
    pictures = list((first[1] / "overlays").rglob("*.png"))
    assert len(pictures) == 3
    assert min(max(cv2.imread(str(p)).shape) for p in pictures) >= 800


def test_the_report_shows_all_of_it(first: tuple[PredictSummary, Path]) -> None:
    """tests/pipelines/test_report.py looks closer."""
    page = (first[1] / "report.html").read_text()
    assert f"<dt>Detections</dt><dd>{first[0].detections:,} " in page
    assert page.count("<img ") == IMAGES - 1
    assert page.count('<a class="picture" href="overlays/') == 3
    assert f"{first[1]}/report.html: what was found, as a web page with pictures" in str(first[0])


def test_the_report_alone_is_made_without_ray_and_again_for_more_pictures(
    first: tuple[PredictSummary, Path], model: str, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(first[1], out)
    before = snapshot(out)
    (out / "report.html").unlink()
    prepared = prepare(model, str(images), str(out))
    assert not prepared.needs_ray
    run_prediction(prepared)
    assert snapshot(out) == before
    written = (out / "report.html").stat().st_mtime_ns
    predict(model, str(images), str(out), run=DRAWN)
    assert (out / "report.html").stat().st_mtime_ns == written, "it was finished"
    predict(model, str(images), str(out), run=replace(DRAWN, overlays=5))
    assert (out / "report.html").read_text().count('<a class="picture" href="overlays/') == 5
    every = replace(DRAWN, overlays=IMAGES)  # one of them is broken, and has no picture
    predict(model, str(images), str(out), run=every)
    written = (out / "report.html").stat().st_mtime_ns
    predict(model, str(images), str(out), run=every)
    assert (out / "report.html").stat().st_mtime_ns == written, "nothing was drawn"
    (out / "report.html").unlink()
    run_prediction(prepare(model, str(images), str(out)))
    shown = (out / "report.html").read_text().count('<a class="picture" href="overlays/')
    assert shown == IMAGES - 1, "it shows what is there, whoever asked for it"


def test_again_computes_only_what_is_missing(
    first: tuple[PredictSummary, Path], model: str, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(first[1], out)
    before = snapshot(out)
    again = predict(model, str(images), str(out), run=DRAWN)
    assert (again.images_made, again.detections) == (0, first[0].detections)
    assert snapshot(out) == before
    (out / "predictions/part-00001.parquet").unlink()
    untouched = (out / "predictions/part-00000.parquet").stat().st_mtime_ns
    repaired = predict(model, str(images), str(out), run=DRAWN)
    assert repaired.images_made == 2
    assert snapshot(out) == before
    assert (out / "predictions/part-00000.parquet").stat().st_mtime_ns == untouched
    (out / "rejects.parquet").unlink()
    assert predict(model, str(images), str(out), run=DRAWN).images_made == IMAGES
    assert snapshot(out) == before


def test_what_a_killed_run_left_is_completed(
    first: tuple[PredictSummary, Path], model: str, images: Path, tmp_path: Path
) -> None:
    """As it is after a kill between two chunks: a plan, one receipt, its part, and half of the next part."""
    out = tmp_path / "killed"
    shutil.copytree(first[1], out)
    store = open_store(str(out))
    manifest = json.loads((out / "manifest.json").read_text())
    done, _ = _receipts_of(store, manifest)
    store.write_bytes(PLAN, json.dumps(manifest["plan"]).encode())
    write_receipt(store, done)
    for name in ("manifest.json", "coco_results.json", "rejects.parquet", "predictions/part-00001.parquet"):
        (out / name).unlink()
    (out / "predictions" / f".part-00001.parquet.{'1' * 32}.part").write_bytes(b"half")
    summary = predict(model, str(images), str(out), run=DRAWN)
    assert (summary.images_made, summary.chunks_made, summary.chunks) == (2, 1, 2)
    assert "1 made now, 1 were finished before" in str(summary)
    assert snapshot(out) == snapshot(first[1])


def test_a_file_that_has_changed_is_predicted_again_with_its_chunk_alone(
    first: tuple[PredictSummary, Path], model: str, images: Path, tmp_path: Path
) -> None:
    out, mended = tmp_path / "out", tmp_path / "images"
    shutil.copytree(images, mended)
    store = open_store(str(out))
    predict(model, str(mended), str(out), run=DRAWN)
    before = snapshot(out)
    (mended / BROKEN).write_bytes((mended / "00" / "tall.webp").read_bytes())
    again = predict(model, str(mended), str(out), run=DRAWN)
    assert (again.images_made, again.rejects_by_reason) == (2, {})
    after = snapshot(out)
    different = {name for name in before if before[name] != after.get(name)}
    always = {"manifest.json", "rejects.parquet", "report.html", "predictions/part-00001.parquet"}
    assert always <= different <= always | {"coco_results.json"}
    assert not store.exists(receipt_name(0))


def test_another_model_or_other_images_are_refused(
    first: tuple[PredictSummary, Path], model: str, images: Path, tmp_path: Path
) -> None:
    other = load_model(model)
    torch.nn.init.zeros_(other.rpn.objectness.bias)
    torch.nn.init.ones_(other.rpn.objectness.weight)
    save_model(other, tmp_path / "model")
    with pytest.raises(ValueError, match="holds predictions of another model: choose another --out"):
        predict(str(tmp_path / "model"), str(images), str(first[1]))
    with pytest.raises(ValueError, match="holds predictions of other images"):
        predict(model, str(images / "00"), str(first[1]))
    (tmp_path / "stray" / "predictions").mkdir(parents=True)
    (tmp_path / "stray" / "predictions" / "part-00000.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="of unknown origin"):
        predict(model, str(images), str(tmp_path / "stray"))
    with pytest.raises(FileNotFoundError, match="holds no images"):
        predict(model, model, str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"another --batch-size: 1 there, 2 here: choose another --out"):
        predict(model, str(images), str(first[1]), options=PredictOptions(batch_size=2))
    with pytest.raises(ValueError, match=r"another --score-threshold: 0.05 there, 0.3 here"):
        predict(model, str(images), str(first[1]), options=PredictOptions(score_threshold=0.3))
    with pytest.raises(ValueError, match=r"--classes zebra: the model has no such category; it has 1 circle"):
        predict(model, str(images), str(tmp_path / "none"), options=PredictOptions(classes=("zebra",)))
    with pytest.raises(ValueError, match=r"--keypoints yes: the model .* finds none"):
        predict(model, str(images), str(tmp_path / "none"), options=PredictOptions(keypoints="yes"))
    with pytest.raises(ValueError, match=r"--overlay-images a.png: there is no such image"):
        predict(model, str(images), str(tmp_path / "none"), run=PredictRun(overlay_images=("a.png",)))
    with pytest.raises(ValueError, match=r"--actors 3 of a CPU each, but Ray has 2 CPUs"):
        predict(model, str(images), str(tmp_path / "few"), run=PredictRun(actors=3))
    assert not (tmp_path / "none").exists()


def test_from_bucket_to_bucket(
    first: tuple[PredictSummary, Path], model: str, images: Path, s3: str, ray_cluster: None
) -> None:
    for folder, target in ((images, f"{s3}/predict/in"), (Path(model), f"{s3}/predict/model")):
        for name in open_store(str(folder)).list():
            open_store(target).write_bytes(name, (folder / name).read_bytes())
    predict(f"{s3}/predict/model", f"{s3}/predict/in", f"{s3}/predict/out", run=PredictRun(overlays=1))
    store = open_store(f"{s3}/predict/out")
    table = pq.read_table(io.BytesIO(store.read_bytes("predictions/part-00001.parquet")))
    local = pq.read_table(first[1] / "predictions/part-00001.parquet")
    assert table["detections"].equals(local["detections"])
    assert table["uri"][0].as_py().startswith(f"{s3}/predict/in/")
    assert sum(name.startswith("overlays/") for name in store.list()) == 1
    assert store.read_bytes("report.html").count(b"<img ") == IMAGES - 1


def test_a_list_and_the_images_of_it_that_cannot_be_read(
    first: tuple[PredictSummary, Path], model: str, images: Path, tmp_path: Path
) -> None:
    names = sorted(open_store(str(images)).list((".png", ".jpg")))[1:4]
    lines = [f"{images}/{names[0]}", "gone.png", f"{images}/{names[1]}", f"{images}/{names[0]}", "../x.png"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    run = PredictRun(overlays=3, overlay_images=("random",), overlay_seed=3)  # all whose names can be read
    summary = predict(model, f"{tmp_path}/list.txt", str(tmp_path / "out"), run=run)
    assert (summary.images, summary.overlays) == (5, 2), "none of a reject"
    rejects = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert [row["reason"].split(":")[0] for row in rejects] == [
        "no such file", "listed twice", "file name leads out of the image folder",
    ]  # fmt: skip
    rows = pq.read_table(tmp_path / "out" / "predictions/part-00000.parquet").to_pylist()
    whole = {row["uri"]: row["detections"] for row in pq.read_table(first[1] / "predictions").to_pylist()}
    assert [row["uri"] for row in rows] == [lines[0], lines[2]]
    assert all(row["detections"] == whole[row["uri"]] for row in rows)


def test_shards_are_predicted_in_pixels_of_their_sources(
    model: str, toy_shards: str, toy_data: ToySummary, tmp_path: Path
) -> None:
    """Equal to `mrcnn evaluate`'s results, which looks at the same rows."""
    dataset = ShardDataset(toy_shards)
    summary = predict(model, toy_shards, str(tmp_path), run=PredictRun(overlays=2, coco_results=True))
    assert (summary.images, summary.overlays) == (len(dataset), 2)
    assert (tmp_path / "report.html").read_text().count("<img ") == len(dataset)
    judged = judge_rows(load_model(model), dataset, range(len(dataset)))
    rows = pq.read_table(tmp_path / "predictions").to_pylist()
    assert [row["image_id"] for row in rows] == [row.image["id"] for row in judged]
    assert [(row["height"], row["width"]) for row in rows] == [(r.image["height"], r.image["width"]) for r in judged]
    for row, each in zip(rows, judged, strict=True):
        assert [found["rle"] for found in row["detections"]] == [r["segmentation"] for r in each.results]
    truth = json.loads(Path(toy_data.annotations_uri).read_text())
    ours = evaluate_coco(truth, json.loads((tmp_path / "coco_results.json").read_text()))
    assert ours.mask == pytest.approx(metrics_of(judged, dataset.categories).mask, abs=1e-6, nan_ok=True)
