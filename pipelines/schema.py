"""The Arrow schema of the shards, and the manifest beside them.

Plain Arrow types only: polars, DuckDB and pyarrow read a shard without this project.
"""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = 1

SEGMENTATION = pa.struct(
    [
        pa.field("polygons", pa.list_(pa.list_(pa.float32()))),  # each x1, y1, x2, y2, ...; null where there is an rle
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

SHARD = pa.schema(
    [
        pa.field("image_id", pa.int64()),
        pa.field("uri", pa.string()),
        pa.field("height", pa.int32()),  # of the stored image, as all coordinates
        pa.field("width", pa.int32()),
        pa.field("source_height", pa.int32()),
        pa.field("source_width", pa.int32()),
        pa.field("encoding", pa.string()),  # raw (H x W x 3 uint8 RGB), jpeg or png
        pa.field("image", pa.binary()),
        pa.field("instances", pa.list_(INSTANCE)),
    ],
    metadata={"mrcnn.schema_version": str(SCHEMA_VERSION)},
)
