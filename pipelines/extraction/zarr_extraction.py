"""Extraction into a Zarr cache: the plan is told, its units are shared out over processes, and the finished products
become a set.
"""

import time
from dataclasses import replace

from hdovd.cache.catalog import Catalog, FeatureSet
from hdovd.cache.schema import Level
from hdovd.core.errors import HdovdError, counted
from hdovd.data.coco import Exif
from hdovd.pipelines.common.format import duration, size
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.extraction.config import Executor, ExtractConfig
from hdovd.pipelines.extraction.engine import Extraction
from hdovd.pipelines.extraction.object_text import object_text_entry
from hdovd.pipelines.extraction.prepare import ExtractReport, Log, plan_lines, prepare
from hdovd.pipelines.extraction.sharing import do_share, this_share
from hdovd.pipelines.teachers.base import Teacher


def fill_cache(config: ExtractConfig, log: Log = print, teacher: Teacher | None = None) -> ExtractReport:
    """Fill the Zarr cache at `config.cache` with what it lacks: see `extract_clip`."""
    share = this_share(config.share)
    if config.executor is Executor.RAY:
        from hdovd.pipelines.extraction.ray_executor import do_with_ray

        if share.count > 1:
            raise HdovdError(
                "--executor ray shares the work out by itself: start one process, without --shard and torchrun"
            )
    log = log if share.speaks else lambda _: None
    extraction = prepare(config, log, teacher)
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
            do_with_ray(extraction, config, log)
        else:
            do_share(extraction, share)
    except KeyboardInterrupt:
        log(f"stopped: {len(extraction.done)} parts were written and stay; the same command goes on with the rest")
        raise
    _finish(extraction, catalog, config, report, log, time.monotonic() - since)
    return report


def _finish(
    extraction: Extraction, catalog: Catalog, config: ExtractConfig, report: ExtractReport, log: Log, seconds: float
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
