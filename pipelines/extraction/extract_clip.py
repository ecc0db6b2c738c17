"""Extraction: run the frozen CLIP once over class names, nouns, images, base boxes and proposals. See
`hdovd.cache.schema` for what it writes.
"""

from hdovd.pipelines.extraction.config import ExtractConfig, Store
from hdovd.pipelines.extraction.prepare import ExtractReport, Log
from hdovd.pipelines.extraction.tar_extraction import extract_to_tars
from hdovd.pipelines.extraction.zarr_extraction import fill_cache
from hdovd.pipelines.teachers.base import Teacher


def extract_clip(config: ExtractConfig, log: Log = print, teacher: Teacher | None = None) -> ExtractReport:
    """Fill the cache at `config.cache` with what it lacks. Raises HdovdError for bad input.

    `teacher`: another model than the CLIP that `config` names.
    """
    config.check()
    extract = extract_to_tars if config.store is Store.WEBDATASET else fill_cache
    return extract(config, log, teacher)
