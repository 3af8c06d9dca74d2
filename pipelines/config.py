"""Settings of a build. Imports nothing heavy, so that the command line can show them at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Encoding = Literal["raw", "jpeg", "png"]


@dataclass(frozen=True)
class BuildConfig:
    """Settings of `build-data`."""

    images: str
    """Folder of the images: a local path or s3://bucket/prefix."""
    annotations: str
    """COCO instances or keypoints JSON."""
    out: str
    """Folder for the shards."""
    shorter_side: int = 800
    """Pixels of the shorter side after resizing (the paper's)."""
    longer_side: int = 1333
    """Bound of the longer side, which wins over `shorter_side`."""
    encoding: Encoding = "raw"
    """How pixels are stored: raw (exact, fastest to read), jpeg (quality 95, an eighth of the size) or png (exact)."""
    rows_per_shard: int = 128
    """Images in one shard file, which is also one task's work."""

    def __post_init__(self) -> None:
        if not 0 < self.shorter_side <= self.longer_side:
            raise ValueError(
                f"shorter side is {self.shorter_side}, but must be positive and at most the longer side "
                f"({self.longer_side}): the paper has 800 and 1333"
            )
        if self.rows_per_shard < 1:
            raise ValueError(f"rows per shard is {self.rows_per_shard}, but must be at least 1")
        if self.encoding not in ("raw", "jpeg", "png"):
            raise ValueError(f"encoding is {self.encoding!r}, but must be raw, jpeg or png")
