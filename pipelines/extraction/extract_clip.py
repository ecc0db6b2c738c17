"""Extraction: run the frozen CLIP once over class names, nouns, images, base boxes and proposals. See
`hdovd.cache.schema` for what it writes.

Extraction into a Zarr cache: the plan is told, its units are shared out over processes, and the finished products
become a set.

Extraction straight to tar shards: `hdovd extract-clip --store webdataset`.

Rows come in parts that are no shard's, and a killed extraction must go on where it was; so it fills a Zarr cache,
`.zarr` in the folder of the shards, exports that, and deletes it when every shard has been read back.
"""

import time
from dataclasses import replace

from hdovd.cache.catalog import Catalog, FeatureSet
from hdovd.cache.identity import differences
from hdovd.cache.local import open_folder
from hdovd.cache.schema import TAR_META, Level
from hdovd.cache.store import Folder
from hdovd.cache.tar_shards import TarMeta, TarShards, forget_shard, unfinished_shards
from hdovd.core.errors import HdovdError, counted
from hdovd.core.log import log, quiet
from hdovd.data.coco import Exif
from hdovd.pipelines.common.console import duration, progress, size
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.extraction.config import Executor, ExtractConfig, Store
from hdovd.pipelines.extraction.engine import Extraction, do_share, this_share
from hdovd.pipelines.extraction.prepare import ExtractReport, plan_lines, prepare
from hdovd.pipelines.extraction.source import TarExportConfig
from hdovd.pipelines.extraction.tar_export import export_tars
from hdovd.pipelines.extraction.text import object_text_entry
from hdovd.pipelines.teachers.base import Teacher


def fill_cache(config: ExtractConfig, teacher: Teacher | None = None) -> ExtractReport:
    """Fill the Zarr cache at `config.cache` with what it lacks: see `extract_clip`."""
    share = this_share(config.share)
    if config.executor is Executor.RAY:
        from hdovd.pipelines.extraction.ray_executor import do_with_ray

        if share.count > 1:
            raise HdovdError(
                "--executor ray shares the work out by itself: start one process, without --shard and torchrun"
            )
    extraction = prepare(config, teacher)
    config = replace(
        config, precision=Precision.of(extraction.teacher.identity.get("compute_dtype")) or config.precision
    )
    plans = list(extraction.plans.values())
    report = ExtractReport(
        {p.level: p.decision for p in plans}, {p.level: p.rows for p in plans}, {p.level: p.new_rows for p in plans}
    )
    with_pictures = any(extraction.plans[level].new_rows for level in (Level.IMAGE, Level.INSTANCE))
    probe = extraction.probe() if with_pictures and share.speaks else None
    for line in plan_lines(plans, probe, config, share.count, extraction.workers):
        log(line)
    if config.dry_run:
        log("a dry run: nothing was written")
        return report
    catalog = Catalog.create(config.cache)
    for name in catalog.folder.sweep():
        log(f"deleted {name}, left half-written by a process that is dead")
    extraction.begin(catalog)
    since = time.monotonic()
    try:
        if config.executor is Executor.RAY:
            do_with_ray(extraction, config)
        else:
            do_share(extraction, share)
    except KeyboardInterrupt:
        log(f"stopped: {len(extraction.done)} parts were written and stay; the same command goes on with the rest")
        raise
    _finish(extraction, catalog, config, report, time.monotonic() - since)
    return report


def _finish(
    extraction: Extraction, catalog: Catalog, config: ExtractConfig, report: ExtractReport, seconds: float
) -> None:
    """Say what was done; name the set if all of it is there."""
    if all(decision == "hit" for decision in report.levels.values()):
        log("everything is there: nothing to extract")
    report.whole = extraction.whole
    if not report.whole:
        mine, everything = (
            [unit for unit in extraction.done if unit.level is not Level.PSEUDO_LABEL],
            sum(map(len, extraction.units())),
        )
        log(
            f"this worker is done, it made {len(mine)} parts; {len(extraction.left())} of {everything} are other "
            f"workers' or missing: when all have ended, the same command without --shard finishes what is left"
        )
        return
    sets, origin = catalog.sets(), extraction.origin
    before = sets.get(config.features)
    if (
        before is not None
        and origin.get("made_by") is None
        and before.proposals.get("identity") == origin.get("identity", "")
    ):
        origin = before.proposals  # a file that was moved without its sidecar takes nothing away
    features = FeatureSet(
        {level: plan.key for level, plan in extraction.plans.items()},
        extraction.split.skips.by_reason,
        config.to_dict(),
        origin,
        object_text_entry(extraction.teacher, extraction.templates, sets.values()),
    )
    if before != features:
        catalog.write_set(config.features, features)
    if count := extraction.turned_either_way():
        log(
            f"{counted(count, 'picture has', 'pictures have')} an EXIF orientation, and a size that fits turned and as "
            f"stored: --exif "
            + (
                "apply turned upright; were the boxes drawn on what is stored? --exif ignore"
                if config.exif is Exif.APPLY
                else "ignore left as stored; were the boxes drawn on upright pictures? --exif apply"
            )
        )
    if before is not None and not before.object_text:
        log(f'set {config.features}: the text embedding of "object" was added')
    for level in (Level.IMAGE, Level.INSTANCE):
        report.failed |= extraction.product(level).failed()
    for image_id, reason in list(report.failed.items())[:20]:
        log(f"failed: image {image_id}: {reason}")
    if report.failed:
        log(
            f"{counted(len(report.failed), 'image has', 'images have')} no embeddings, and training goes without: "
            f"hdovd cache info tells why, extract-clip --retry-failed tries again"
        )
    pictures = (Level.IMAGE, Level.INSTANCE)
    rows = sum(
        extraction.plans[unit.level].new_rows_of([unit.part]) for unit in extraction.done if unit.level in pictures
    )
    elsewhere = sum(report.new_rows[level] for level in pictures) - rows
    total = sum(extraction.product(level).bytes() for level in extraction.plans)
    log(
        f"{config.cache}: set {config.features} is whole, {size(total)}"
        + (f"; {rows:,d} pictures and boxes in {duration(seconds)} ({rows / seconds:.0f}/s)" if rows else "")
        + (f"; {elsewhere:,d} by other processes" if elsewhere > 0 else "")
    )


ZARR = ".zarr"


def extract_to_tars(config: ExtractConfig, teacher: Teacher | None = None) -> ExtractReport:
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
        meta = TarMeta.from_bytes(folder.read(TAR_META), f"{config.cache}/{TAR_META}")
        if config.precision is Precision.AUTO:
            known = (Precision.of(inputs.get("clip", {}).get("compute_dtype")) for inputs in meta.key_inputs().values())
            inner = replace(inner, precision=next(filter(None, known), Precision.AUTO))
        with quiet():  # what it has to say is said once more where there is something to extract
            extraction = prepare(inner, teacher)
        _require_same(config, extraction, meta)
        if not unfinished_shards(folder, range(meta.shards)) and not folder.exists(f"{ZARR}/zarr.json"):
            return _hit(config, extraction, meta)
        teacher = extraction.teacher
    if config.dry_run:
        return fill_cache(inner, teacher)
    with folder.claim(f"worker-{share.command.index * share.world + share.rank}", wait=False):
        report = fill_cache(inner, teacher)
    if report.whole:
        for other in range(share.count):  # nobody may be reading what is deleted
            with folder.claim(f"worker-{other}", wait=True):
                pass
        with folder.claim("export", wait=True):
            if folder.exists(f"{ZARR}/zarr.json"):  # no other worker has done it
                _export(config)
    return report


def _export(config: ExtractConfig) -> None:
    """Write the shards, read them back, delete the Zarr cache."""
    export_tars(
        TarExportConfig(
            cache=f"{config.cache}/{ZARR}",
            out=config.cache,
            data=config.data,
            protocol=config.protocol,
            features=config.features,
        )
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


def _hit(config: ExtractConfig, extraction: Extraction, meta: TarMeta) -> ExtractReport:
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


def extract_clip(config: ExtractConfig, teacher: Teacher | None = None) -> ExtractReport:
    """Fill the cache at `config.cache` with what it lacks. Raises HdovdError for bad input.

    `teacher`: another model than the CLIP that `config` names.
    """
    config.check()
    extract = extract_to_tars if config.store is Store.WEBDATASET else fill_cache
    with quiet(not this_share(config.share).speaks):
        return extract(config, teacher)
