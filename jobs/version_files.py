"""What a version of a model says of itself: files for programs, and a description for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jobs.evaluated import Evaluated
from jobs.redaction import redact
from mrcnn.config import InputConfig
from mrcnn.model import MaskRCNN
from mrcnn.structures import Category

LABELS_FILE, PREPROCESSING_FILE, EVALUATED_FILE = "label_map.json", "preprocessing.json", "evaluation.json"
DESCRIPTION_LENGTH = 5000  # MLflow's bound
LABELS_SHOWN = 40


def version_files(model: MaskRCNN, evaluated: Evaluated) -> dict[str, bytes]:
    """By name: what labels mean, what happens to an image before the network, and what was measured."""
    contents: dict[str, Any] = {
        LABELS_FILE: label_map(model.categories),
        PREPROCESSING_FILE: model.config.to_dict()["input"],
        EVALUATED_FILE: evaluated.to_dict(),
    }
    return {name: redact(json.dumps(content, indent=1) + "\n").encode() for name, content in contents.items()}


def label_map(categories: Sequence[Category]) -> list[dict[str, Any]]:
    """Labels from 1 on, with the data set's ids and names."""
    return [
        {"label": label, "category_id": each.id, "name": each.name, "keypoints": list(each.keypoints)}
        for label, each in enumerate(categories, start=1)
    ]


def describe(model: MaskRCNN, evaluated: Evaluated, *, run: str) -> str:
    """Markdown for MLflow's page of the version."""
    heads = {"masks": model.config.mask.head != "none", "keypoints": model.config.keypoint.num_keypoints > 0}
    found = ", ".join(["boxes", *(name for name, is_there in heads.items() if is_there)])
    parts = [
        f"{model.config.backbone.name}, finds {found}; run `{run}`, step {evaluated.step}",
        f"Measured on `{evaluated.data or 'unknown'}`, manifest digest `{evaluated.data_digest}`:",
        _metrics_table(evaluated),
        _labels_table(model.categories, evaluated),
        _preprocessing(model.config.input),
    ]
    return redact("\n\n".join(parts))[:DESCRIPTION_LENGTH]


def _metrics_table(evaluated: Evaluated) -> str:
    rows = [[name.removeprefix("val/").replace("_", " "), f"{value:.4f}"] for name, value in evaluated.metrics.items()]
    return _table(["metric", "value"], rows)


def _labels_table(categories: Sequence[Category], evaluated: Evaluated) -> str:
    measures = [m for m in ("mask_AP", "keypoint_AP", "box_AP") if any(m in x for x in evaluated.per_category.values())]
    rows = []
    for label, category in enumerate(categories[:LABELS_SHOWN], start=1):
        numbers = evaluated.per_category.get(category.name, {})
        rows.append([str(label), str(category.id), category.name[:40], *(_number(numbers.get(m)) for m in measures)])
    if len(categories) > LABELS_SHOWN:
        rows.append(["...", "", f"{len(categories) - LABELS_SHOWN} more in {LABELS_FILE}", *("" for _ in measures)])
    return _table(["label", "category id", "name", *(m.replace("_", " ") for m in measures)], rows)


def _preprocessing(config: InputConfig) -> str:
    return (
        f"Images are RGB, resized to {config.shorter_side} pixels of the shorter side, at most {config.longer_side} of "
        f"the longer ({config.resize}); the network sees {config.channels.upper()}, minus {list(config.mean)}, "
        f"over {list(config.std)}, padded to multiples of {config.size_divisor}."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in line) + " |" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
