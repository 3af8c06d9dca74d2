"""Settings of a build. Imports nothing heavy, so that the command line can show them at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Encoding = Literal["raw", "jpeg", "png"]
Format = Literal["coco", "cityscapes", "voc", "labelme", "images"]
SMALLEST_TILE = 32  # pixels, as for predictions
MOST_PIXELS = (2**31 - 1) // 3  # raw, in a column with 32-bit offsets
FORMATS: tuple[str, ...] = get_args(Format)


@dataclass(frozen=True)
class BuildConfig:
    """Settings of `build-data`."""

    images: str
    """URI of the folder of images (cityscapes, voc: of the data set); with the format images also of a .txt list."""
    out: str
    """Folder for the shards. What is finished there stays: give another one for images or annotations that changed."""
    format: Format = "coco"
    """coco: one JSON; cityscapes, voc: their folders; labelme: a JSON for each image, beside it
    or with its path; images: no annotations."""
    annotations: str | None = None
    """coco: the instances, person_keypoints or image_info JSON."""
    split: str | None = None
    """cityscapes, voc: which part of the data set; train by default."""
    classes: tuple[str, ...] = ()
    """labelme: names of the classes in the order of their labels; by default all that occur, sorted."""
    follow_links: bool = False
    """Read what symbolic links show of other folders, too; by default such images are rejects."""
    shorter_side: int = 800
    """Pixels of the shorter side after resizing (the paper's); 0 keeps the size that each image has."""
    longer_side: int = 1333
    """Bound of the longer side, which wins over `shorter_side`."""
    more_sides: tuple[int, ...] = ()
    """Further shorter sides, made in the same pass; `longer_side` in proportion. Each is a data set of its own, in a
    folder of `out` that is named after the side, as is then the first one."""
    tile: int = 0
    """Side of the square tiles into which larger images are cut before resizing; 0 leaves them whole."""
    tile_overlap: int = 128
    """Pixels by which neighbouring tiles overlap, at least. An object that is smaller is whole in one of them."""
    tile_min_share: float = 0.25
    """Share of an object's pixels that a tile must show to have it, 0 to 1; of the tile's, where these are fewer."""
    max_pixels: int = 89_478_485
    """Largest image that is decoded, in pixels; a larger one is rejected as a decompression bomb (Pillow's bound)."""
    encoding: Encoding = "raw"
    """How pixels are stored: raw (exact, fastest to read), jpeg (quality 95, an eighth of the size) or png (exact)."""
    rows_per_shard: int = 128
    """Images in one shard file, which is also one task's work."""
    max_reject_share: float = 0.1
    """Largest share of the images that may be rejected, 0 to 1; above it the build fails. More than a tenth is rather a
    wrong folder than bad files."""
    max_rejected_annotation_share: float = 0.5
    """The same for the annotations, those of rejected images apart. Larger, because an annotation file may well cover
    more than its images."""

    def __post_init__(self) -> None:
        self._check_source()
        self._check_sizes()
        if self.rows_per_shard < 1:
            raise ValueError(f"rows per shard is {self.rows_per_shard}, but must be at least 1")
        for name in ("max_reject_share", "max_rejected_annotation_share"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ValueError(f"{name.replace('_', ' ')} is {share}, but must be from 0 to 1: 0.1 is a tenth")
        if self.encoding not in ("raw", "jpeg", "png"):
            raise ValueError(f"encoding is {self.encoding!r}, but must be raw, jpeg or png")

    def folders(self) -> tuple[tuple[str, int, int], ...]:
        """Folder, shorter and longer side of each data set that is made."""
        if not self.more_sides:
            return ((self.out, self.shorter_side, self.longer_side),)
        factor = self.longer_side / self.shorter_side if self.shorter_side else 0
        sides = [(side, round(side * factor) or self.longer_side) for side in (self.shorter_side, *self.more_sides)]
        return tuple((f"{self.out.rstrip('/')}/{shorter or 'original'}", shorter, longer) for shorter, longer in sides)

    def _check_sizes(self) -> None:
        if not 0 <= self.shorter_side <= self.longer_side:
            raise ValueError(
                f"shorter side is {self.shorter_side}, but must be positive and at most the longer side "
                f"({self.longer_side}), or 0 to keep each image's own size: the paper has 800 and 1333"
            )
        sides = (self.shorter_side, *self.more_sides)
        if len(set(sides)) != len(sides) or not all(0 <= side <= self.longer_side for side in self.more_sides):
            raise ValueError(
                f"more sides are {', '.join(map(str, self.more_sides))}: give other ones than {self.shorter_side}, "
                f"each once, from 0 (each image's own size) to {self.longer_side}"
            )
        large = [f"{shorter} x {longer}" for _, shorter, longer in self.folders() if shorter * longer > MOST_PIXELS]
        if large:
            raise ValueError(
                f"sides are {', '.join(large)}: their product must be at most {MOST_PIXELS}, whose bytes a row can "
                "just hold; the paper has 800 x 1333"
            )
        too_small = self.tile and (self.tile < SMALLEST_TILE or self.tile <= self.tile_overlap)
        if too_small or self.tile_overlap < 0:
            raise ValueError(
                f"tile is {self.tile} and tile overlap {self.tile_overlap}: give a side of at least {SMALLEST_TILE} "
                "pixels, larger than the overlap, which is at least 0, such as 1024 and 128, or tile 0 to cut nothing"
            )
        if not 0 <= self.tile_min_share <= 1:
            raise ValueError(f"tile min share is {self.tile_min_share}, but must be from 0 to 1: 0.25 is a quarter")
        if not 0 < self.max_pixels <= MOST_PIXELS:
            raise ValueError(
                f"max pixels is {self.max_pixels}, but must be from 1 to {MOST_PIXELS}, whose bytes a row can just hold"
            )

    def _check_source(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}, but must be one of {', '.join(FORMATS)}")
        if self.format == "coco" and not self.annotations:
            raise ValueError("--annotations is missing: format coco needs its JSON; --format images has no annotations")
        owners = {"annotations": ("coco",), "split": ("cityscapes", "voc"), "classes": ("labelme",)}
        for option, formats in owners.items():
            if getattr(self, option) and self.format not in formats:
                raise ValueError(f"--{option} is for {' and '.join(formats)}, not for {self.format}: leave it out")
        if self.split is not None and (not self.split or "/" in self.split):
            raise ValueError(f"split is {self.split!r}, but must be one name, such as train or val")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes are {', '.join(self.classes)}: each must come once")
