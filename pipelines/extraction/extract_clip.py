"""Extraction: run the frozen CLIP once over class names, nouns, images, base boxes and proposals. See
`hdovd.cache.schema` for what it writes.

First inputs are read, the teacher is loaded, and all levels are planned; the plan is told, its units are shared out
over processes, and the finished products become a set.

Straight to tar shards (`--store webdataset`): rows come in parts that are no shard's, and a killed extraction must go
on where it was; so it fills a Zarr cache, `.zarr` in the folder of the shards, exports that, and deletes it when every
shard has been read back.
"""

import os
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from hdovd.cache import TAR_META, Catalog, FeatureSet, KeyInputs, Level, hash_file, require_same
from hdovd.cache.picture_files import known_files
from hdovd.cache.reader import FeatureCache
from hdovd.cache.store import Folder, open_folder
from hdovd.cache.tar_shards import TarMeta, TarShards, forget_shard, unfinished_shards
from hdovd.core import HdovdError, counted, log, quiet, shorten
from hdovd.data import Exif, Skips, Split, load_protocol
from hdovd.pipelines.common.console import duration, progress, size
from hdovd.pipelines.common.images import read_alike
from hdovd.pipelines.common.options import Precision
from hdovd.pipelines.embedding.embedders import Pictures, embedders_of
from hdovd.pipelines.extraction.config import TEMPERATURE, Executor, ExtractConfig, Share, Store, this_share
from hdovd.pipelines.extraction.engine import Extraction, do_share, plan_levels
from hdovd.pipelines.extraction.executors import do_with_ray, do_with_submitit
from hdovd.pipelines.extraction.export import export_tars
from hdovd.pipelines.extraction.identities import (
    TextRows,
    box_table,
    level_inputs,
    object_text_entry,
    picture_hashes,
    read_class_embeddings,
    read_synonyms,
)
from hdovd.pipelines.extraction.label_weights import expectation, label_evidence, on_object
from hdovd.pipelines.extraction.pseudo_labels import FLOOR, read_verdicts, rule_line, settled
from hdovd.pipelines.extraction.source import ExportConfig
from hdovd.pipelines.nouns.allowed import Nouns, named_novel, offered_nouns
from hdovd.pipelines.proposal_files.file import Proposals, made_by_line, read_table, usable_proposals
from hdovd.pipelines.teachers.base import TEACHERS, Teacher


def prepare(config: ExtractConfig, teacher: Teacher | None = None) -> Extraction:
    """Read the inputs, load the model and plan. Writes nothing. Raises HdovdError for bad input."""
    catalog = Catalog.find_at(config.cache)  # first: what is in the way is said before all work
    protocol = load_protocol(config.protocol)
    split = config.data.load("train2017", protocol, base_only=True, exif=config.exif)
    proposals, origin = _proposals(config, split)
    pictures = picture_hashes(split, () if catalog is None else catalog.products())
    if pictures.changed:
        log(
            f"{counted(len(pictures.changed), 'picture is', 'pictures are')} not what the cache has of the same id and "
            f"size (images {shorten([*pictures.changed])}): to be embedded anew"
        )
    table = box_table(split.images, proposals, pictures.values)
    classes = TextRows(
        protocol.names,
        {} if config.synonyms is None else read_synonyms(config.synonyms, protocol.names),
        None if config.class_embeddings is None else read_class_embeddings(config.class_embeddings, protocol.names),
    )
    nouns = _nouns(config, split)
    if nouns is not None and config.labels.top > len(nouns.vocabulary):
        raise HdovdError(f"--label-top-k {config.labels.top}: there are {len(nouns.vocabulary)} nouns")
    novel = list(dict.fromkeys(name for own in protocol.novel for name in (own, *classes.synonyms.get(own, ()))))
    if nouns is not None and (leaked := named_novel(nouns.vocabulary, novel)):
        log(
            f"note: the vocabulary holds {len(leaked)} of the {len(novel)} novel names ({shorten(list(leaked))}); "
            "allowed, since captions hold them, and to be reported with results"
        )
    teacher = teacher or TEACHERS.find(config.teacher)(
        config.clip,
        config.pretrained,
        device=_own_device(config.device),
        precision=config.precision,
        activation=config.activation,
        cached=partial(cached_precision, catalog, config.features),
    )
    log(*teacher.notes)
    if classes.embeddings is not None and classes.embeddings.shape[1] != teacher.dim:
        raise HdovdError(
            f"--class-embeddings {config.class_embeddings} holds rows of {classes.embeddings.shape[1]} values, the "
            f"CLIP gives {teacher.dim}: are they of another CLIP?"
        )
    for rows in (classes, *(() if nouns is None else (TextRows(nouns.vocabulary),))):
        if rows.embeddings is None:
            log(*teacher.prompt_notes(rows.texts, config.templates))
    embedders = embedders_of(
        teacher, Pictures(split.images, split.path, table.offset, table.box, split.exif), config.recipe
    )
    rule, base = config.labels, [(name, *classes.synonyms.get(name, ())) for name in protocol.base]
    temperature, verdicts, told = getattr(teacher, "temperature", TEMPERATURE), None, None
    if nouns is not None:
        rule = settled(rule, nouns, split.images, base, temperature)
        if line := rule_line(rule, nouns):
            log(line)
        if config.verdicts is not None:
            verdicts = read_verdicts(config.verdicts, table, nouns.vocabulary)
            told = {"identity": verdicts.identity(), "temperature": float(f"{temperature:.6g}"), "floor": FLOOR}
            origin = origin | {"verdicts": {"file": config.verdicts.name, "sha256": hash_file(config.verdicts)}}
    plans = plan_levels(
        catalog,
        level_inputs(teacher, table, nouns, classes, config.templates, embedders, rule, told),
        table,
        teacher.dim,
        part_rows=config.part_rows,
        retry_failed=config.retry_failed,
        read_alike=partial(read_alike, split),
    )
    return Extraction(config, split, table, pictures, nouns, classes, base, teacher, embedders, plans, origin, verdicts)


def _own_device(asked: str) -> str:
    """Under torchrun, one GPU a process."""
    if "TORCHELASTIC_RUN_ID" in os.environ and asked in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return asked


def cached_precision(catalog: Catalog | None, features: str, clip: KeyInputs) -> Precision | None:
    """What the cache's embeddings of a CLIP were computed in: those of the set `features`, else of whichever are there;
    None without any.

    clip: its identity, without `compute_dtype`.
    """
    if catalog is None:
        return None
    named = catalog.sets().get(features, FeatureSet({})).levels
    for product in sorted(catalog.products(), key=lambda product: named.get(product.level) != product.key):
        found = product.attributes["key_inputs"].get("clip", {})
        if all(found.get(name) == value for name, value in clip.items()):
            return Precision.of(found.get("compute_dtype"))
    return None


def _nouns(config: ExtractConfig, split: Split) -> Nouns | None:
    """What pseudo boxes may be named, if they are. Raises HdovdError for files that do not fit."""
    nouns = offered_nouns(config.nouns, config.vocabulary, config.captions)
    if nouns is None:
        return None
    if not any(nouns.offered(image.id) for image in split.images):
        source = f"--captions {config.captions}" if config.nouns is None else f"--nouns {config.nouns}"
        raise HdovdError(
            f"{source} has no noun for any of the {len(split.images)} training images (ids "
            f"{shorten([image.id for image in split.images], 4)}): it is of the captions of other images"
        )
    return nouns


def _proposals(config: ExtractConfig, split: Split) -> tuple[dict[int, Proposals], dict[str, Any]]:
    """The proposals, and what the set's record says of them."""
    if config.proposals is None:
        log("no --proposals: caching base boxes alone; pseudo boxes need them")
        return {}, {}
    found = read_table(config.proposals, split.annotations)
    identity = found.identity()
    log(
        f"proposals {identity} of {config.proposals}: {len(found.image_id):,d} boxes, {found.form}; "
        + made_by_line(found.made_by),
        *found.notes,
    )
    before = dict(split.skips.by_reason)
    proposals = usable_proposals(found, config.proposals, split.images, split.skips)
    log(*Skips({reason: ids for reason, ids in split.skips.by_reason.items() if reason not in before}).lines())
    return proposals, {"file": config.proposals.name, "identity": identity, "made_by": found.made_by}


@dataclass(slots=True)
class ExtractReport:
    """What an extraction did. `whole`: whether the cache is, or other workers' parts are missing."""

    levels: dict[Level, str] = field(default_factory=dict)
    rows: dict[Level, int] = field(default_factory=dict)
    new_rows: dict[Level, int] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    whole: bool = True


def report_plan(extraction: Extraction, config: ExtractConfig, share: Share) -> ExtractReport:
    """Say the plan as a table, with what it will cost."""
    log(f"plan for {config.cache}", f"  {'level':13s}{'plan':8s}{'rows':>11s}{'new':>11s}{'new bytes':>11s}  key")
    plans, report = extraction.plans, ExtractReport()
    for level, plan in plans.items():
        new = plan.new_rows if plan.parts else (0 if plan.decision == "hit" else plan.rows)
        log(
            f"  {level:13s}{plan.decision:8s}{plan.rows:11,d}{new:11,d}{size(new * plan.row_bytes):>11s}  "
            f"{plan.key[:12]}",
            *(f"  {'':13s}{reason}" for reason in filter(None, plan.reason.split("; "))),
        )
        report.levels[level], report.rows[level], report.new_rows[level] = plan.decision, plan.rows, plan.new_rows
    new_rows = {level: plans[level].new_rows for level in (Level.IMAGE, Level.INSTANCE)}
    if any(new_rows.values()) and share.speaks:
        costs, memory = extraction.probe(), extraction.teacher.peak_memory_bytes()
        seconds = sum(cost.seconds(new_rows[level], extraction.workers) for level, cost in costs.items())
        box, who = costs[Level.INSTANCE], counted(share.processes, "process", "processes")
        log(
            f"  {sum(new_rows.values()):,d} pictures and boxes: about {duration(seconds / share.processes)} (a short "
            f"probe: {1000 * box.cut_s:.2f} ms to cut, {1000 * box.embed_s:.2f} ms to embed a box; "
            f"{who if config.executor is Executor.LOCAL else 'a worker'} with --workers {extraction.workers})"
            + ("" if memory is None else f"; GPU memory {size(memory)}")
        )
    return report


def fill_cache(
    config: ExtractConfig, teacher: Teacher | None = None, prepared: Extraction | None = None
) -> ExtractReport:
    """Fill the Zarr cache at `config.cache` with what it lacks: see `extract_clip`."""
    share = this_share(config.share)
    if config.executor is not Executor.LOCAL and share.processes > 1:
        raise HdovdError(
            f"--executor {config.executor} shares the work out by itself: start one process, without --shard and "
            f"torchrun"
        )
    extraction = prepared or prepare(config, teacher)
    config = replace(
        config, precision=Precision.of(extraction.teacher.identity.get("compute_dtype")) or config.precision
    )
    report = report_plan(extraction, config, share)
    if config.dry_run:
        log("a dry run: nothing was written")
        return report
    catalog = Catalog.create(config.cache)
    log(*(f"deleted {name}, left half-written by a process that is dead" for name in catalog.folder.sweep()))
    extraction.begin(catalog)
    since = time.monotonic()
    try:
        if config.executor is Executor.RAY:
            do_with_ray(extraction, config, fill_cache)
        elif config.executor is Executor.SUBMITIT:
            do_with_submitit(extraction, config, fill_cache)
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
        made = sum(unit.level is not Level.PSEUDO_LABEL for unit in extraction.done)
        log(
            f"this worker is done, it made {made} parts; {len(extraction.left())} of "
            f"{sum(map(len, extraction.units()))} are other workers' or missing: when all have ended, the same command "
            f"without --shard finishes what is left"
        )
        return
    sets, origin = catalog.sets(), extraction.origin
    keys = {level: plan.key for level, plan in extraction.plans.items()}
    before = sets.get(config.features, FeatureSet({}))
    if origin.get("made_by") is None and before.proposals.get("identity") == origin.get("identity", ""):
        origin = origin | {"made_by": before.proposals.get("made_by")}  # a file that was moved without its sidecar
    features = FeatureSet(
        keys,
        extraction.split.skips.by_reason,
        config.to_dict(),
        origin,
        object_text_entry(extraction.teacher, extraction.templates, sets.values()),
        before.label_weights if before.levels == keys else {},
    )
    if before != features:
        catalog.write_set(config.features, features)
    if Level.PSEUDO_LABEL in features.levels and this_share(config.share).speaks:  # one of torchrun's processes
        _weigh_labels(extraction, catalog, config, features)
    known = known_files(extraction.product(Level.IMAGE))
    if count := len(np.unique(known["image_id"][known["either"]])):
        log(
            f"{counted(count, 'picture has', 'pictures have')} an EXIF orientation, and a size that fits turned and as "
            f"stored: --exif "
            + (
                "apply turned upright; were the boxes drawn on what is stored? --exif ignore"
                if config.exif is Exif.APPLY
                else "ignore left as stored; were the boxes drawn on upright pictures? --exif apply"
            )
        )
    pictures = (Level.IMAGE, Level.INSTANCE)
    for level in pictures:
        report.failed |= extraction.product(level).failed()
    log(*(f"failed: image {image_id}: {reason}" for image_id, reason in list(report.failed.items())[:20]))
    if report.failed:
        log(
            f"{counted(len(report.failed), 'image has', 'images have')} no embeddings, and training goes without: "
            f"hdovd cache info tells why, extract-clip --retry-failed tries again"
        )
    rows = sum(
        extraction.plans[unit.level].new_rows_of([unit.part]) for unit in extraction.done if unit.level in pictures
    )
    elsewhere = sum(report.new_rows[level] for level in pictures) - rows
    log(
        f"{config.cache}: set {config.features} is whole, "
        + size(sum(extraction.product(level).bytes() for level in extraction.plans))
        + (f"; {rows:,d} pictures and boxes in {duration(seconds)} ({rows / seconds:.0f}/s)" if rows else "")
        + (f"; {elsewhere:,d} by other processes" if elsewhere > 0 else "")
    )


def _weigh_labels(extraction: Extraction, catalog: Catalog, config: ExtractConfig, features: FeatureSet) -> None:
    """Fit the weight of pseudo labels to base boxes, keep it with the set, and say what to expect of them."""
    cache, fitted = FeatureCache(config.cache, config.features), features.label_weights
    if (fitted.get("failed"), fitted.get("proposals_on_object")) != (
        len(cache.failed()),
        on_object(features.proposals),
    ):
        evidence = label_evidence(cache, extraction.split, extraction.base_names, extraction.offered)
        try:
            fitted = evidence.fitted_to(cache)
        except HdovdError as error:
            log(f"note: {error}; hdovd calibrate tells more")
            return
        catalog.write_set(config.features, replace(features, label_weights=fitted))
    log(*expectation(cache, fitted))


ZARR = ".zarr"


def extract_to_tars(config: ExtractConfig, teacher: Teacher | None = None) -> ExtractReport:
    """Fill the folder `config.cache` with tar shards; a hit if they are there, made from the same inputs.

    Raises HdovdError for bad input, or if the folder holds anything else.
    """
    folder, share = open_folder(config.cache), this_share(config.share)
    inner, extraction = replace(config, cache=f"{config.cache}/{ZARR}", store=Store.ZARR), None
    if folder.exists("zarr.json"):
        raise HdovdError(
            f"{config.cache} is a Zarr cache: give the shards another folder, or make them with hdovd cache export"
        )
    if folder.exists(TAR_META):
        meta = TarMeta.from_bytes(folder.read(TAR_META), f"{config.cache}/{TAR_META}")
        if config.precision is Precision.AUTO:
            known = (Precision.of(inputs.get("clip", {}).get("compute_dtype")) for inputs in meta.key_inputs().values())
            inner = replace(inner, precision=next(filter(None, known), Precision.AUTO))
        extraction = prepare(inner, teacher)
        _require_same(config, extraction, meta)
        if not unfinished_shards(folder, range(meta.shards)) and not folder.exists(f"{ZARR}/zarr.json"):
            return _hit(config, extraction, meta)
    if config.dry_run:
        return fill_cache(inner, teacher, extraction)
    with folder.claim(f"worker-{share.index * share.world + share.rank}", wait=False):
        report = fill_cache(inner, teacher, extraction)
    if report.whole:
        for other in range(share.processes):  # nobody may be reading what is deleted
            with folder.claim(f"worker-{other}", wait=True):
                pass
        with folder.claim("export", wait=True):
            if folder.exists(f"{ZARR}/zarr.json"):  # no other worker has done it
                _export(config)
    return report


def _export(config: ExtractConfig) -> None:
    """Write the shards, read them back, delete the Zarr cache."""
    export_tars(
        ExportConfig(
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
    require_same(
        {str(level): plan.inputs for level, plan in extraction.plans.items()},
        {str(level): inputs for level, inputs in meta.key_inputs().items()},
        f"{config.cache} holds tar shards made from something else; give another folder",
    )


def _hit(config: ExtractConfig, extraction: Extraction, meta: TarMeta) -> ExtractReport:
    if config.retry_failed and meta.failed():
        raise HdovdError(
            f"--retry-failed: shards cannot be changed. Make a cache of them (hdovd cache import), give it to "
            f"extract-clip --retry-failed, and export it to another folder than {config.cache}"
        )
    for plan in extraction.plans.values():
        plan.decision, plan.reason, plan.missing = "hit", "", []
    report = report_plan(extraction, config, Share())
    report.failed = meta.failed()
    log("everything is there: nothing to extract")
    if not config.dry_run:
        _delete_zarr(open_folder(config.cache))  # of a run that was killed while it deleted
    return report


def _delete_zarr(folder: Folder) -> None:
    """The root's metadata first: what is left of a deletion that was cut short is no cache."""
    folder.delete(f"{ZARR}/zarr.json")
    folder.delete(ZARR)


def extract_clip(config: ExtractConfig, teacher: Teacher | None = None) -> ExtractReport:
    """Fill the cache at `config.cache` with what it lacks. Raises HdovdError for bad input.

    `teacher`: another model than the CLIP that `config` names.
    """
    config.check()
    with quiet(not this_share(config.share).speaks):
        return extract_to_tars(config, teacher) if config.store is Store.WEBDATASET else fill_cache(config, teacher)
