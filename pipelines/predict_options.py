"""Settings of a prediction. Imports nothing heavy, so that the command line can show them at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DEFAULT_OVERLAP = 0.25  # of a tile's side


@dataclass(frozen=True)
class PredictOptions:
    """What the predictions' bytes depend on, beside the model and the images. Goes on only with the same ones."""

    score_threshold: float | None = None
    """Detections have to be above it, 0 to 1; by default the model's own."""
    max_detections: int | None = None
    """Best detections that are kept of an image, with --tile of each tile; by default the model's own."""
    classes: tuple[str, ...] = ()
    """Names or ids of the categories to detect; by default all. The others take no place among the best."""
    keypoints: Literal["model", "yes", "no"] = "model"
    """no: leave them out; yes: refuse a model that has none; model: as it has."""
    tta: bool = False
    """Look at each image at 3/4, 1 and 5/4 of the model's size and mirrored, and merge what is found."""
    tile: str = ""
    """SIZE or SIZE:OVERLAP in pixels: look at larger images tile by tile, and merge what tiles show of the same object.
    OVERLAP is a quarter of SIZE by default; smaller objects are whole in some tile."""
    batch_size: int = 1
    """Images that the model sees at a time. Only those of the same size for the network are, so no padding is added;
    float rounding may still differ from one at a time."""
    max_pixels: int = 89_478_485
    """Largest image that is decoded, in pixels; a larger one is a reject (Pillow's bound)."""

    def __post_init__(self) -> None:
        threshold = self.score_threshold
        if threshold is not None and not 0 <= threshold < 1:
            raise ValueError(f"--score-threshold is {threshold}, but must be at least 0 and below 1: 0.05 is usual")
        for name in ("max_detections", "batch_size", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be at least 1: see its default")
        _ = self.tiles

    @property
    def tiles(self) -> tuple[int, int]:
        """Side of the tiles and their overlap, pixels; 0, 0 without."""
        if not self.tile:
            return 0, 0
        size, separator, overlap = self.tile.partition(":")
        if not size.isdecimal() or (separator and not overlap.isdecimal()):
            raise ValueError(f"--tile is {self.tile!r}, but must be SIZE or SIZE:OVERLAP in pixels: as in 1024:256")
        side, shared = int(size), int(overlap) if separator else int(int(size) * DEFAULT_OVERLAP)
        if side < 32 or not 0 < shared <= side // 2:
            raise ValueError(
                f"--tile is {self.tile!r}, but SIZE must be at least 32, OVERLAP from 1 to half of it: as in 1024:256"
            )
        return side, shared


@dataclass(frozen=True)
class PredictRun:
    """How a prediction is run, and what is made of it: it may go on with others."""

    actors: int | None = None
    """Processes with the model; by default as many as there are GPUs for, or CPUs where there is no GPU."""
    gpus_per_actor: float = 1.0
    """GPUs of each where there are any: 0.5 lets two share one, 0 takes CPUs."""
    overlays: int = 0
    """How many images are drawn with what was found in them."""
    overlay_images: tuple[str, ...] = ("first",)
    """Which: first, random (by --overlay-seed), or the names of images, which are then all drawn."""
    overlay_seed: int = 0
    """The same seed draws the same images."""
    coco_results: bool = False
    """Write coco_results.json, too: COCO's results format."""

    def __post_init__(self) -> None:
        if self.overlays < 0:
            raise ValueError(f"--overlays is {self.overlays}, but must be 0 or more")
        if self.actors is not None and self.actors < 1:
            raise ValueError(f"--actors is {self.actors}, but must be at least 1: leave it out to use all GPUs or CPUs")
        gpus = self.gpus_per_actor
        if not (0 <= gpus <= 1 or gpus == int(gpus)) or gpus < 0:
            raise ValueError(f"--gpus-per-actor is {gpus}, but must be from 0 to 1, or a whole number: 1 is usual")
        if not self.overlay_images or (len(self.overlay_images) > 1 and {"first", "random"} & {*self.overlay_images}):
            raise ValueError("--overlay-images must be first, random, or names of images: give one of the three")

    @property
    def overlay_names(self) -> tuple[str, ...]:
        """Names of the images that are to be drawn, where they are given."""
        return () if self.overlay_images[0] in ("first", "random") else self.overlay_images
