"""What stands in a feature cache: levels, their arrays, and the version of it all.

A cache is a Zarr v3 group. Every level is a group in it, and in that stand products, one a key (see `identity`):
what made it decides the key, so products of other templates, boxes or CLIPs lie side by side. N images, M rows
of boxes (image by image, base boxes before proposals, proposals best first), K names, D embedding size.
Embeddings are L2-normalised in float32 and stored as float16; boxes are xyxy, absolute pixels of the original
image. A product reads on its own in any Zarr client:

    boxes/KEY         image_id (N,) i64, image_hash (N,) u64, image_size (N, 2) i32 (width, height), offset (N+1,) i64,
                      box (M, 4) f32, source (M,) u8, score (M,) f32, annotation_id (M,) i64 (-1 for proposals)
    instance/KEY      embedding (M, D) f16; image_id, image_hash, offset, box
    image/KEY         embedding (N, D) f16; image_id, image_hash, image_size
    class/KEY         embedding (K, D) f16; attribute names
    noun/KEY          embedding (K, D) f16; attribute names
    pseudo_label/KEY  noun (M,) i32, a row of the noun level or -1 for none; noun_cosine (M,) f32; for labels of the k
                      best nouns (k > 1, the product's dim) also top_noun (M, k) i32, best first, and top_weight (M, k)
                      f32, which add up to 1 or, where there is no noun, are -1 and 0

Beside the arrays, every product has `parts/`: tables.json and one NUMBER.json for every part, a fixed slice of its
rows that is one Zarr shard of each of its row arrays. A part's file is written last, so what is listed there is
what is done; it holds sizes and checksums of the objects, and which images could not be read, with the reason.
An index of instance rows (`hdovd cache index`) is one part more, the object index-KEY and parts/index-KEY.json, which
no set or run depends on; KEY follows from what made it, the checksums of all rows among them.

Products of images also have `pictures/`: what the files were that their rows were made from (see `picture_files`).

    sets/NAME.json    which products belong together: what `hdovd train` reads; "default" unless named; and the text of
                      "object"
    named/NAME        that there is such a set, so that one which is lost is missed
    runs/ID.json      which training runs used which products

Sets and runs have a checksum of their own, under sha256; those of older versions have none.
"""

from enum import IntEnum, StrEnum

SCHEMA_VERSION = 2
PART_ROWS = 65_536  # rows of a part of the row levels
IMAGE_PART_ROWS = 4_096  # of the image level: fewer rows, so that many workers find work
CHUNK_ROWS = 1_024
TAR_SAMPLES = 1_000  # images of a tar shard
DEFAULT_SET = "default"
TAR_META = "meta.safetensors"  # what tells a folder of tar shards from a cache
NORM_TOLERANCE = 1e-3  # of embeddings that are written
STORED_NORM_TOLERANCE = 2 * NORM_TOLERANCE  # and what rounding to float16 adds
TABLES = "tables"  # the part that holds everything but the row arrays
INDEX = "index-"  # how the names of parts begin that are an index of the rows


class Level(StrEnum):
    BOXES = "boxes"
    INSTANCE = "instance"
    IMAGE = "image"
    CLASS = "class"
    NOUN = "noun"
    PSEUDO_LABEL = "pseudo_label"


class Source(IntEnum):
    """What a row's box is."""

    BASE_BOX = 0
    PROPOSAL = 1


# Row arrays, written a part at a time: name -> (dtype, whether a row is D values).
ROW_ARRAYS: dict[Level, dict[str, tuple[str, bool]]] = {
    Level.BOXES: {},
    Level.INSTANCE: {"embedding": ("float16", True)},
    Level.IMAGE: {"embedding": ("float16", True)},
    Level.CLASS: {"embedding": ("float16", True)},
    Level.NOUN: {"embedding": ("float16", True)},
    Level.PSEUDO_LABEL: {"noun": ("int32", False), "noun_cosine": ("float32", False)},
}
# Row arrays of pseudo labels that are made of several nouns, beside the others; a row is k values.
TOP_ARRAYS: dict[str, tuple[str, bool]] = {"top_noun": ("int32", True), "top_weight": ("float32", True)}
# Tables, written at once when a product is begun: name -> dtype.
TABLE_ARRAYS: dict[Level, dict[str, str]] = {
    Level.BOXES: {
        "image_id": "int64",
        "image_hash": "uint64",
        "image_size": "int32",
        "offset": "int64",
        "box": "float32",
        "source": "uint8",
        "score": "float32",
        "annotation_id": "int64",
    },
    Level.INSTANCE: {"image_id": "int64", "image_hash": "uint64", "offset": "int64", "box": "float32"},
    Level.IMAGE: {"image_id": "int64", "image_hash": "uint64", "image_size": "int32"},
    Level.CLASS: {},
    Level.NOUN: {},
    Level.PSEUDO_LABEL: {},
}


def row_arrays(level: Level, dim: int) -> dict[str, tuple[str, bool]]:
    """The row arrays of a product, whose rows of many values have `dim` of them: D embedding values, or k nouns."""
    return ROW_ARRAYS[level] | (TOP_ARRAYS if level is Level.PSEUDO_LABEL and dim else {})
