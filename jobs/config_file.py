"""Where the settings of a training come from: a preset, or the file of an earlier run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from jobs.config import TrainConfig
from jobs.presets import PRESETS
from jobs.redaction import redact
from pipelines.storage import read_uri


def read_config(uri: str) -> TrainConfig:
    """The settings in a JSON file: a run's config.json or run.json, local, s3://, or runs:/ID/config.json in MLflow.

    Raises FileNotFoundError without the file, ValueError for one that holds something else, naming what.
    """
    if uri.startswith("runs:/"):
        from jobs.tracking import read_artifact

        text = read_artifact(uri)
    else:
        text = read_uri(uri)
    try:
        content = json.loads(text)
        is_run_file = isinstance(content, dict) and content.keys() >= {"run_id", "config"}
        return TrainConfig.from_dict(content["config"] if is_run_file else content)
    except (ValueError, TypeError) as error:  # the latter where a text stands for a number
        raise ValueError(f"{redact(uri)} does not hold the settings of a training: {error}") from error


def config_uri(words: Sequence[str]) -> str | None:
    """The file of settings that the words of a command line give, if they do."""
    found: str | None = _split(words)[0]
    return found


def starting_point(words: Sequence[str]) -> tuple[str, TrainConfig, list[str]]:
    """What the words after `mrcnn train` begin from, as they say it: PRESET, or --config URI at any place; the settings
    that it gives; and the other words.

    Raises ValueError for neither, for both, for an unknown preset, and as `read_config` does.
    """
    config, rest = _split(words)
    preset = rest[0] if rest and not rest[0].startswith("-") else None
    if preset is None:
        if config is None:
            raise ValueError(f"begin with a preset, one of {', '.join(PRESETS)}, or with --config URI")
        return f"--config {config}", read_config(config), rest
    if config is not None:
        raise ValueError(f"the settings come from {preset} or from --config {config}: give one of them")
    if preset not in PRESETS:
        raise ValueError(f"{preset!r} is no preset: take one of {', '.join(PRESETS)}")
    return preset, PRESETS[preset], rest[1:]


def _split(words: Sequence[str]) -> tuple[str | None, list[str]]:
    parser = argparse.ArgumentParser(prog="mrcnn train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    known, rest = parser.parse_known_args(list(words))
    return known.config, rest
