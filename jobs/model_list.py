"""`mrcnn models list`: the versions of registered models as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby

from jobs.promotion import in_words, short
from jobs.tracking import MEASURES, RUN_NAME_TAG, VAL_DIGEST_TAG


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    number: int
    aliases: tuple[str, ...]
    made: int
    """Milliseconds, as MLflow has them"""
    run_id: str
    tags: Mapping[str, str]

    def cells(self, measures: Sequence[str]) -> list[str]:
        """Its row, with these of MEASURES."""
        made = datetime.fromtimestamp(self.made / 1000).strftime("%Y-%m-%d %H:%M")
        run = self.tags.get(RUN_NAME_TAG) or self.run_id
        numbers = [_number(self.tags.get(measure)) for measure in measures]
        digest = short(self.tags.get(VAL_DIGEST_TAG, ""))
        return [str(self.number), ", ".join(self.aliases), *numbers, digest, made, run]


def table(versions: Sequence[Version]) -> str:
    """A table a model, the newest versions first."""
    ordered = sorted(versions, key=lambda v: (v.name, -v.number))
    return "\n\n".join(
        "\n".join(_lines(name, list(group))) for name, group in groupby(ordered, key=lambda version: version.name)
    )


def _lines(name: str, versions: Sequence[Version]) -> Iterator[str]:
    measures = [m for m in MEASURES if m != "val/keypoint_AP" or any(m in version.tags for version in versions)]
    head = ["version", "aliases", *map(in_words, measures), "measured on", "made", "run"]
    rows = [head, *(version.cells(measures) for version in versions)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    yield f"models:/{name}"
    for row in rows:
        yield ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()


def _number(text: str | None) -> str:
    """Whatever stands in a tag: a list is no place to stumble over it."""
    try:
        return "-" if text is None else f"{float(text):.4f}"
    except ValueError:
        return text or "-"
