"""Extraction straight to tar shards: `hdovd extract-clip --store webdataset`.

Rows come in parts that are no shard's, and a killed extraction must go on where it was; so it fills a Zarr cache,
`.zarr` in the folder of the shards, exports that, and deletes it when every shard has been read back.
"""

from dataclasses import replace

from hdovd.cache.identity import differences
from hdovd.cache.open import open_folder
from hdovd.cache.schema import TAR_META
from hdovd.cache.store import Folder
from hdovd.cache.tar_meta import TarMeta
from hdovd.cache.tar_shards import TarShards, forget_shard, unfinished_shards
from hdovd.core.errors import HdovdError
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.common.progress import progress
from hdovd.pipelines.extraction.config import ExtractConfig, Store
from hdovd.pipelines.extraction.engine import Extraction
from hdovd.pipelines.extraction.prepare import ExtractReport, Log, plan_lines, prepare
from hdovd.pipelines.extraction.sharing import this_share
from hdovd.pipelines.extraction.tar_config import TarExportConfig
from hdovd.pipelines.extraction.tar_export import export_tars
from hdovd.pipelines.extraction.zarr_extraction import fill_cache
from hdovd.pipelines.teachers.base import Teacher

ZARR = ".zarr"


def extract_to_tars(config: ExtractConfig, log: Log = print, teacher: Teacher | None = None) -> ExtractReport:
    """Fill the folder `config.cache` with tar shards; a hit if they are there, made from the same inputs.

    Raises HdovdError for bad input, or if the folder holds anything else.
    """
    folder, share = open_folder(config.cache), this_share(config.share)
    inner = replace(config, cache=f"{config.cache}/{ZARR}", store=Store.ZARR)
    if folder.exists("zarr.json"):
        raise HdovdError(
            f"{config.cache} is a Zarr cache: give the shards another folder, or make them with hdovd cache export"
        )
    if folder.exists(TAR_META):
        meta, said = TarMeta.from_bytes(folder.read(TAR_META), f"{config.cache}/{TAR_META}"), list[str]()
        if config.precision is Precision.AUTO:
            known = (Precision.of(inputs.get("clip", {}).get("compute_dtype")) for inputs in meta.key_inputs().values())
            inner = replace(inner, precision=next(filter(None, known), Precision.AUTO))
        extraction = prepare(inner, said.append, teacher)
        _require_same(config, extraction, meta)
        if not unfinished_shards(folder, range(meta.shards)) and not folder.exists(f"{ZARR}/zarr.json"):
            for line in said if share.speaks else ():
                log(line)
            return _hit(config, extraction, meta, log if share.speaks else lambda _: None)
        teacher = extraction.teacher
    if config.dry_run:
        return fill_cache(inner, log, teacher)
    with folder.claim(f"worker-{share.command.index * share.world + share.rank}", wait=False):
        report = fill_cache(inner, log, teacher)
    if report.whole:
        for other in range(share.count):  # nobody may be reading what is deleted
            with folder.claim(f"worker-{other}", wait=True):
                pass
        with folder.claim("export", wait=True):
            if folder.exists(f"{ZARR}/zarr.json"):  # no other worker has done it
                _export(config, log)
    return report


def _export(config: ExtractConfig, log: Log) -> None:
    """Write the shards, read them back, delete the Zarr cache."""
    export_tars(
        TarExportConfig(
            cache=f"{config.cache}/{ZARR}",
            out=config.cache,
            data=config.data,
            protocol=config.protocol,
            features=config.features,
        ),
        log,
    )
    shards = TarShards(config.cache)
    for number in progress(shards.numbers, "verifying", "shard"):
        try:
            shards.verify(number)
        except HdovdError as error:
            forget_shard(open_folder(config.cache), number)
            raise HdovdError(f"{error}. It counts as not written now: run the same command again") from error
    _delete_zarr(open_folder(config.cache))
    log(
        f"{config.cache}: every shard was read back and is verified; the Zarr cache that they were made from is deleted"
    )


def _require_same(config: ExtractConfig, extraction: Extraction, meta: TarMeta) -> None:
    if config.features != meta.name:
        raise HdovdError(
            f"{config.cache} holds the set of features {meta.name}, not {config.features}: give another folder"
        )
    expected = {str(plan.level): plan.inputs for plan in extraction.plans.values()}
    lines = differences(expected, {str(level): inputs for level, inputs in meta.key_inputs().items()})
    if lines:
        raise HdovdError(
            f"{config.cache} holds tar shards made from something else; give another folder:\n  " + "\n  ".join(lines)
        )


def _hit(config: ExtractConfig, extraction: Extraction, meta: TarMeta, log: Log) -> ExtractReport:
    if config.retry_failed and meta.failed():
        raise HdovdError(
            f"--retry-failed: shards cannot be changed. Make a cache of them (hdovd cache import), give it to "
            f"extract-clip --retry-failed, and export it to another folder than {config.cache}"
        )
    plans = list(extraction.plans.values())
    for plan in plans:
        plan.decision, plan.reason, plan.missing = "hit", "", []
    for line in plan_lines(plans, None, config, 1):
        log(line)
    log("everything is there: nothing to extract")
    if not config.dry_run:
        _delete_zarr(open_folder(config.cache))  # of a run that was killed while it deleted
    return ExtractReport(
        {p.level: p.decision for p in plans},
        {p.level: p.rows for p in plans},
        {p.level: 0 for p in plans},
        meta.failed(),
    )


def _delete_zarr(folder: Folder) -> None:
    """The root's metadata first: what is left of a deletion that was cut short is no cache."""
    folder.delete(f"{ZARR}/zarr.json")
    folder.delete(ZARR)
