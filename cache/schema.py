"""What stands in a feature cache: the levels, their arrays, and the version of it all.

A cache is one Zarr v3 group with a group a level. N images, M instance rows (image by image, base boxes
before proposals), K class names, V vocabulary nouns, D embedding size. Embeddings are L2-normalised in
float32 and stored as float16; boxes are xyxy, absolute pixels of the original image.

    instance   embedding (M, D) f16, box (M, 4) f32, source (M,) u8, annotation_id (M,) i64 (-1 for proposals),
               score (M,) f32, noun (M,) i32 (-1: none), noun_cosine (M,) f32, image_id (N,) i64, offset (N+1,) i64
    image      embedding (N, D) f16, image_id (N,) i64
    class      embedding (K, D) f16; attribute names
    noun       embedding (V, D) f16; attribute names

Every group has the attributes key, key_inputs (see `identity`); instance and image also `failed`, a map from
image id to the reason why the image has no rows.
"""

from enum import IntEnum, StrEnum

SCHEMA_VERSION = 1
SHARD_ROWS = 65_536
CHUNK_ROWS = 1_024


class Level(StrEnum):
    INSTANCE = "instance"
    IMAGE = "image"
    CLASS = "class"
    NOUN = "noun"


class Source(IntEnum):
    """What an instance row's box is."""

    BASE_BOX = 0
    PROPOSAL = 1


# Arrays of the instance level beside `embedding`, one entry a row: name -> (dtype, extra shape).
INSTANCE_COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "box": ("float32", (4,)),
    "source": ("uint8", ()),
    "annotation_id": ("int64", ()),
    "score": ("float32", ()),
    "noun": ("int32", ()),
    "noun_cosine": ("float32", ()),
}
