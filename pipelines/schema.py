"""The Arrow schema of the shards, and the manifest beside them.

Plain Arrow types only: polars, DuckDB and pyarrow read a shard without this project.
"""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = 2

SEGMENTATION = pa.struct(
    [
        pa.field("polygons", pa.list_(pa.list_(pa.float32()))),  # each x1, y1, x2, y2, ...; null where unknown
        # where there are both, this is the mask, and the polygons its outline in fractions of a pixel
        pa.field("rle", pa.struct([pa.field("size", pa.list_(pa.int32(), 2)), pa.field("counts", pa.string())])),
    ]
)

INSTANCE = pa.struct(
    [
        pa.field("label", pa.int16()),  # 1..K, contiguous; the manifest maps it to category id and name
        pa.field("category_id", pa.int32()),  # the data set's own
        pa.field("box", pa.list_(pa.float32(), 4)),  # xyxy
        pa.field("area", pa.float32()),  # of the annotation, scaled with the image
        pa.field("iscrowd", pa.bool_()),
        pa.field("segmentation", SEGMENTATION),
        pa.field("keypoints", pa.list_(pa.float32())),  # x, y, visibility of each keypoint of the category; or null
    ]
)

TILE = pa.struct(
    [
        pa.field("image_id", pa.int64()),  # of the whole image
        pa.field("y", pa.int32()),  # of the tile's corner in it
        pa.field("x", pa.int32()),
        pa.field("height", pa.int32()),  # of the whole image
        pa.field("width", pa.int32()),
    ]
)

SHARD = pa.schema(
    [
        pa.field("image_id", pa.int64()),
        pa.field("uri", pa.string()),
        pa.field("height", pa.int32()),  # of the stored image, as all coordinates
        pa.field("width", pa.int32()),
        pa.field("source_height", pa.int32()),  # before resizing: of the image, or of this tile of it
        pa.field("source_width", pa.int32()),
        pa.field("encoding", pa.string()),  # raw (H x W x 3 uint8 RGB), jpeg or png
        pa.field("image", pa.binary()),
        pa.field("instances", pa.list_(INSTANCE)),
        pa.field("tile", TILE),  # null where the row is a whole image
    ],
    metadata={"mrcnn.schema_version": str(SCHEMA_VERSION)},
)
