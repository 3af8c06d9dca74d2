"""Which images are drawn: chosen by their names and a seed, whatever the chunks."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mrcnn.structures import Category
from pipelines.inputs import Inputs, open_inputs
from pipelines.overlays import DrawSettings, choose, draw_chunk
from pipelines.pixels import MAX_PIXELS
from pipelines.predict import PREDICTIONS
from pipelines.predict_folder import part_name
from pipelines.predict_options import PredictRun
from pipelines.storage import open_store


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    for i in range(12):
        cv2.imwrite(str(tmp_path / f"{i:02d}.png"), np.full((30, 40, 3), 20 * i, np.uint8))
    return open_inputs(str(tmp_path), max_pixels=MAX_PIXELS)


def names(inputs: Inputs, run: PredictRun, size: int = 5) -> list[str]:
    return [item.name for _, items in sorted(choose(inputs, run, size).items()) for item in items]


def random_run(seed: int, count: int = 4) -> PredictRun:
    return PredictRun(overlays=count, overlay_images=("random",), overlay_seed=seed)


def test_the_first_and_those_that_are_named(inputs: Inputs) -> None:
    assert names(inputs, PredictRun(overlays=2)) == ["00.png", "01.png"]
    assert names(inputs, PredictRun()) == []
    assert names(inputs, PredictRun(overlay_images=("07.png", "03.png"))) == ["03.png", "07.png"]
    assert set(choose(inputs, PredictRun(overlays=7), 5)) == {0, 1}
    with pytest.raises(ValueError, match=r"--overlay-images 99.png: there is no such image"):
        choose(inputs, PredictRun(overlay_images=("99.png", "03.png")), 5)
    with pytest.raises(ValueError, match="must be first, random, or names"):
        PredictRun(overlay_images=("first", "03.png"))


def test_random_ones_depend_on_the_seed_alone(inputs: Inputs) -> None:
    chosen = sorted(names(inputs, random_run(1)))
    assert len(set(chosen)) == 4
    assert sorted(names(inputs, random_run(1), size=3)) == chosen
    assert set(names(inputs, random_run(1, 3))) < set(chosen)
    assert len({tuple(names(inputs, random_run(seed))) for seed in range(5)}) == 5


def test_a_picture_is_drawn_from_the_part(inputs: Inputs, tmp_path: Path) -> None:
    """Of an image that was rejected there is none."""
    found = {
        "label": 1, "category_id": 7, "score": 0.9, "box": [5.0, 5.0, 20.0, 10.0], "rle": None, "keypoints": None,
    }  # fmt: skip
    out = open_store(str(tmp_path / "out"))
    chosen = choose(inputs, PredictRun(overlays=2), 5)[0]
    row = {"image_id": 0, "uri": f"{tmp_path}/00.png", "height": 30, "width": 40, "detections": [found]}
    with out.new_file(part_name(0)) as path:
        pq.write_table(pa.Table.from_pylist([row], schema=PREDICTIONS), path)
    settings = DrawSettings(inputs.reader, out, (Category(7, "ball"),))
    task = {"name": part_name(0), "inputs": json.dumps(chosen)}
    assert draw_chunk(task, settings) == {"drawn": 1, "failure": "", "message": ""}
    assert list(out.list((".png",))) == ["overlays/00.png.png"]
    picture = cv2.imread(f"{out.uri}/overlays/00.png.png")
    assert picture.shape == (600, 800, 3)
    assert picture.any(), "the image is black, the box is not"
