"""The rows of a folder of shards, decoded. Nothing of Ray in here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mrcnn.structures import Category
from pipelines.manifest import Manifest
from pipelines.shards import ShardedRows, portrait_rows
from pipelines.storage import open_store
from pipelines.transforms import decode_stored


@dataclass(frozen=True)
class Row:
    """One stored image with its annotations, in pixels of the stored image."""

    image_id: int
    uri: str
    image: NDArray[Any]
    """(H, W, 3) RGB, perhaps read-only: uint8, or float32 once it is resized as torchvision does it"""
    source_size: tuple[int, int]
    """Height and width of the original"""
    instances: list[dict[str, Any]]
    """As in pipelines/schema.py"""
    tile: dict[str, int] | None = None
    """As there: where it lies in its image, if it is a part of one"""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.image.shape[0], self.image.shape[1]


class ShardDataset:
    """The rows of a folder of shards, by number. Opens files when they are first needed; cheap to pickle.

    Raises FileNotFoundError where there is no finished data set, ValueError where it is damaged or of another
    version.
    """

    def __init__(self, uri: str) -> None:
        self._store = open_store(uri)
        self.manifest = Manifest.read(self._store)

    def __getstate__(self) -> dict[str, Any]:
        return {"_store": self._store, "manifest": self.manifest}

    @property
    def uri(self) -> str:
        """Where the shards are."""
        return self._store.uri

    @property
    def categories(self) -> tuple[Category, ...]:
        """Label l is `categories[l - 1]`."""
        return self.manifest.categories

    @cached_property
    def _rows(self) -> ShardedRows:
        return ShardedRows(self._store, self.manifest.shards)

    def __len__(self) -> int:
        return len(self._rows)

    def numbers(self, shard: int) -> range:
        """Numbers of the rows of a shard."""
        return self._rows.numbers(shard)

    def portrait(self) -> NDArray[np.bool_]:
        """(rows,) whether each row is taller than wide, from the manifest alone."""
        return np.concatenate([np.zeros(0, bool), *(portrait_rows(shard) for shard in self.manifest.shards)])

    def read(self, index: int) -> Row:
        """Row by its number, decoded. Threads may call it at once.

        Raises ValueError or FileNotFoundError where its shard is damaged, was changed, or is gone.
        """
        row = self._rows.read(index)
        height, width = row["height"].as_py(), row["width"].as_py()
        try:
            image = decode_stored(
                memoryview(row["image"]).cast("B"),
                encoding=row["encoding"].as_py(),
                height=height,
                width=width,
            )
        except ValueError as error:
            raise self._rows.damaged(index, str(error)) from error
        return Row(
            image_id=row["image_id"].as_py(),
            uri=row["uri"].as_py(),
            image=image,
            source_size=(row["source_height"].as_py(), row["source_width"].as_py()),
            instances=row["instances"].as_py(),
            tile=row["tile"].as_py(),
        )

    def damaged(self, index: int, what: str) -> ValueError:
        """The error to raise where a row turns out to be spoilt after it was read."""
        return self._rows.damaged(index, what)
