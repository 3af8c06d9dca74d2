"""What training does to an image before the network sees it: size, window, and how many objects at most.

All chance is drawn from (seed, epoch, image id): neither threads, nor batches, nor ranks change it. Resizing starts
from the stored image: a side above the stored one brings back no detail, so build the data at the largest side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mrcnn.config import InputConfig
from mrcnn.preprocess import Resize, resize_image, resized_size
from pipelines.dataset import Row
from pipelines.order import image_random, image_seed
from pipelines.rle import Window, segmentations_ends
from pipelines.scaling import Scaling, scale_instances
from pipelines.tiling import part_of

Key = tuple[int, int, int]
"""seed, epoch, image id"""


@dataclass(frozen=True)
class Augmentation:
    """What is done to each image; by default nothing."""

    flip: float = 0.0
    """Probability of mirroring it"""
    jitter_sides: Sequence[int] = ()
    """Shorter sides of which it gets one, in place of the network's usual one"""
    large_jitter: Sequence[float] = ()
    """Smallest and largest factor by which its usual size is multiplied; of what then is larger than usual, a window of
    the usual size is cut. Not together with `jitter_sides`"""
    max_objects: int = 0
    """An image with more objects keeps as many, drawn anew in each epoch: the others are background in that epoch. Of
    crowd regions, where the losses take nothing for background, it keeps as many again. 0: no bound"""

    def flips(self, key: Key) -> bool:
        """Whether an image is mirrored."""
        return image_random(*key, purpose="flip") < self.flip

    def __call__(self, row: Row, key: Key, network_input: InputConfig | None) -> Row:
        """The row as the network gets it, but for mirroring, which its batch does."""
        row = with_fewer_objects(row, key, self.max_objects)  # first: the others would be scaled for nothing
        return row if network_input is None else self._resized(row, key, network_input)

    def _resized(self, row: Row, key: Key, network_input: InputConfig) -> Row:
        if self.jitter_sides:
            side = self.jitter_sides[int(image_random(*key, purpose="side") * len(self.jitter_sides))]
            network_input = replace(network_input, shorter_side=side)
        size = network_size(row, network_input)
        if not self.large_jitter:
            return resize_row(row, size, network_input.resize)
        low, high = self.large_jitter
        factor = low + (high - low) * image_random(*key, purpose="factor")
        larger = max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
        return crop_row(resize_row(row, larger, network_input.resize), random_window(larger, size, key))


UNCHANGED = Augmentation()


def with_fewer_objects(row: Row, key: Key, most: int) -> Row:
    """At most so many objects, and so many crowd regions, in their order; 0: all."""
    if not 0 < most < len(row.instances):
        return row
    generator = np.random.default_rng(image_seed(*key, purpose="objects"))
    crowds = np.array([each["iscrowd"] for each in row.instances], bool)
    kept = [generator.permutation(np.flatnonzero(kind))[:most] for kind in (~crowds, crowds)]
    return replace(row, instances=[row.instances[i] for i in np.sort(np.concatenate(kept))])


def random_window(size: tuple[int, int], most: tuple[int, int], key: Key) -> Window:
    """A window of at most a size, anywhere in an image of another size."""
    height, width = min(size[0], most[0]), min(size[1], most[1])
    y = int(image_random(*key, purpose="window y") * (size[0] - height + 1))
    x = int(image_random(*key, purpose="window x") * (size[1] - width + 1))
    return Window(y, x, height, width)


def crop_row(row: Row, window: Window) -> Row:
    """What a window shows of a row. Objects of which it shows nothing go; boxes of cut masks fit what is left."""
    if (window.height, window.width) == row.size:
        return row
    masks = segmentations_ends([each["segmentation"] for each in row.instances], *row.size)
    part = part_of(window, row.instances, masks, height=row.size[0])
    image = row.image[window.y : window.y + window.height, window.x : window.x + window.width]
    return replace(row, image=image, instances=part.instances)


def network_size(row: Row, network_input: InputConfig) -> tuple[int, int]:
    """Height and width that the network wants of an image."""
    shorter, longer, resize = network_input.shorter_side, network_input.longer_side, network_input.resize
    return resized_size(*row.size, shorter_side=shorter, longer_side=longer, resize=resize)


def resize_row(row: Row, size: tuple[int, int], resize: Resize) -> Row:
    """The row with its image and instances at another size; unchanged if it is of that size. Masks are resized, too:
    see `scale_instances`."""
    if size == row.size:
        return row
    instances = scale_instances(row.instances, Scaling(row.size, size))
    return replace(row, image=resize_image(row.image, *size, resize), instances=instances)
