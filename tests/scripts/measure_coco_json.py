"""Time and memory that the driver of a build needs for a COCO file as large as instances_train2017.json.

    python tests/scripts/measure_coco_json.py [--megabytes 450] [--folder DIR]

Makes the file (118,287 images; objects with about as many polygon points as COCO's), reads it, and prints what that
took. The memory is that of the process (its largest resident set), less what it had after its imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from pipelines.config import BuildConfig
from pipelines.sources.coco import coco_objects, read_coco

IMAGES = 118_287


def write_coco(path: Path, megabytes: int) -> None:
    """A file in the layout of the official one: annotations in no order of images, categories last."""
    rng = np.random.default_rng(0)
    numbers = [f"{each:.2f}" for each in rng.uniform(0, 640, 100_000)]
    with path.open("w") as file:
        file.write('{"info": {"year": 2017}, "licenses": [], "images": [')
        file.write(", ".join(json.dumps(_image(i)) for i in range(IMAGES)))
        file.write('], "annotations": [')
        written, count = file.tell(), 0
        while written < megabytes * 1_000_000:
            start, length = int(rng.integers(0, 90_000)), 2 * int(rng.integers(8, 50))
            polygon = ", ".join(numbers[start : start + length])
            text = (
                f'{{"segmentation": [[{polygon}]], "area": 702.1, "iscrowd": 0, "image_id": {rng.integers(IMAGES)}, '
                f'"bbox": [473.07, 395.93, 38.65, 28.67], "category_id": {1 + count % 80}, "id": {count}}}'
            )
            written += file.write(f"{', ' if count else ''}{text}")
            count += 1
        categories = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
        file.write(f'], "categories": {json.dumps(categories)}}}')


def _image(i: int) -> dict[str, object]:
    url = f"http://images.cocodataset.org/train2017/{i:012d}.jpg"
    sizes = {"height": 480, "width": 640}
    return {"license": 3, "file_name": f"{i:012d}.jpg", "coco_url": url, **sizes, "flickr_url": url, "id": i}


def _peak() -> float:
    """MB of the largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=450)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder, "coco.json")
        write_coco(path, arguments.megabytes)
        size, before, start = path.stat().st_size / 1e6, _peak(), time.perf_counter()
        source = read_coco(BuildConfig(images=folder, annotations=str(path), out="unused"))
        seconds, peak = time.perf_counter() - start, _peak() - before
        print(f"{size:.0f} MB, {len(source.records)} images, {source.annotations} annotations")
        print(f"driver: {seconds:.1f} s ({size / seconds:.0f} MB/s), {peak:.0f} MB ({peak / size:.2f} x the file)")
        start = time.perf_counter()
        some = source.records[:1000]
        found = sum(len(coco_objects(each, (), source.categories).usable) for each in some)
        seconds = time.perf_counter() - start
        print(f"task: {1e6 * seconds / len(some):.0f} us an image, of {found / len(some):.1f} objects")


if __name__ == "__main__":
    main()
