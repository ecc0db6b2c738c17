"""The feature store: embeddings of a frozen CLIP by what made them. What describes a cache stands here; its rows come
by `reader` and `tar_shards`, and go by `writer`.
"""

from hdovd.cache.catalog import SET_NAME_TOLD, Catalog, FeatureSet, RunRecord, is_set_name, is_tar_form
from hdovd.cache.hub import is_hub, local_run
from hdovd.cache.identity import (
    SEAL,
    KeyInputs,
    differences,
    hash_file,
    hash_tables,
    key_of,
    require_same,
    require_seal,
    sealed,
)
from hdovd.cache.product import Product
from hdovd.cache.schema import (
    CHUNK_ROWS,
    DEFAULT_SET,
    IMAGE_PART_ROWS,
    INDEX,
    PART_ROWS,
    SCHEMA_VERSION,
    TABLE_ARRAYS,
    TABLES,
    TAR_META,
    TAR_SAMPLES,
    Level,
    Source,
    row_arrays,
)

__all__ = [
    "CHUNK_ROWS",
    "DEFAULT_SET",
    "IMAGE_PART_ROWS",
    "INDEX",
    "PART_ROWS",
    "SCHEMA_VERSION",
    "SEAL",
    "SET_NAME_TOLD",
    "TABLES",
    "TABLE_ARRAYS",
    "TAR_META",
    "TAR_SAMPLES",
    "Catalog",
    "FeatureSet",
    "KeyInputs",
    "Level",
    "Product",
    "RunRecord",
    "Source",
    "differences",
    "hash_file",
    "hash_tables",
    "is_hub",
    "is_set_name",
    "is_tar_form",
    "key_of",
    "local_run",
    "require_same",
    "require_seal",
    "row_arrays",
    "sealed",
]
