"""What comes before an extraction: inputs read, the teacher loaded, all levels planned. Writes nothing."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hdovd.cache.catalog import Catalog, FeatureSet
from hdovd.cache.identity import KeyInputs
from hdovd.cache.schema import Level
from hdovd.core.errors import HdovdError, counted, shorten
from hdovd.core.log import log
from hdovd.data.coco import Skips, Split
from hdovd.data.protocol import load_protocol
from hdovd.pipelines.common.console import duration, size
from hdovd.pipelines.common.device import workers_for
from hdovd.pipelines.common.images import read_alike
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.embedding.build import embedders_of
from hdovd.pipelines.embedding.embedders import Pictures
from hdovd.pipelines.extraction.boxes import box_table
from hdovd.pipelines.extraction.config import Executor, ExtractConfig
from hdovd.pipelines.extraction.engine import Extraction, Probe, this_share
from hdovd.pipelines.extraction.identities import level_inputs
from hdovd.pipelines.extraction.picture_hashes import picture_hashes
from hdovd.pipelines.extraction.plan import LevelPlan, plan_levels
from hdovd.pipelines.extraction.text import TextRows, read_classes
from hdovd.pipelines.nouns.allowed import Nouns, named_novel, read_noun_file, read_nouns
from hdovd.pipelines.proposal_files.file import Proposals, made_by_line, read_table, usable_proposals
from hdovd.pipelines.teachers.base import Teacher


@dataclass(slots=True)
class ExtractReport:
    """What an extraction did. `whole`: whether the cache is, or other workers' parts are missing."""

    levels: dict[Level, str] = field(default_factory=dict)
    rows: dict[Level, int] = field(default_factory=dict)
    new_rows: dict[Level, int] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    whole: bool = True


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
    classes = read_classes(protocol.names, config.synonyms, config.class_embeddings)
    nouns = _nouns(config, split)
    if nouns is not None and config.labels.top > len(nouns.vocabulary):
        raise HdovdError(f"--label-top-k {config.labels.top}: there are {len(nouns.vocabulary)} nouns")
    novel = list(dict.fromkeys(name for own in protocol.novel for name in (own, *classes.synonyms.get(own, ()))))
    if nouns is not None and (leaked := named_novel(nouns.vocabulary, novel)):
        log(
            f"note: the vocabulary holds {len(leaked)} of the {len(novel)} novel names ({shorten(list(leaked))}); "
            "allowed, since captions hold them, and to be reported with results"
        )
    if teacher is None:
        from hdovd.pipelines.teachers.openclip import load_clip

        share = this_share(config.share)
        loaded: Teacher = load_clip(
            config.clip,
            config.pretrained,
            device=share.device(config.device),
            precision=config.precision,
            activation=config.activation,
            cached=partial(cached_precision, catalog, config.features),
        )
    else:
        loaded = teacher
    for note in loaded.notes:
        log(note)
    classes.require_dim(loaded.dim, config.class_embeddings)
    for rows in (classes, *(() if nouns is None else (TextRows(nouns.vocabulary),))):
        for note in rows.notes(loaded, config.templates):
            log(note)
    embedders = embedders_of(
        loaded, Pictures(split.images, split.path, table.offset, table.box, split.exif), config.recipe
    )
    inputs = level_inputs(loaded, table, nouns, classes, config.templates, embedders, config.labels)
    plans = plan_levels(
        catalog,
        inputs,
        table,
        loaded.dim,
        part_rows=config.part_rows,
        retry_failed=config.retry_failed,
        read_alike=partial(read_alike, split),
    )
    return Extraction(
        split,
        table,
        pictures,
        nouns,
        classes,
        loaded,
        embedders,
        plans,
        templates=config.templates,
        batch_size=config.batch_size,
        workers=workers_for(loaded.device, config.workers),
        origin=origin,
    )


def cached_precision(catalog: Catalog | None, features: str, clip: KeyInputs) -> Precision | None:
    """What the cache's embeddings of a CLIP were computed in: those of the set `features`, else of whichever are there;
    None without any.

    clip: its identity, without `compute_dtype`.
    """
    if catalog is None:
        return None
    named = catalog.sets().get(features, FeatureSet({})).levels
    products = sorted(catalog.products(), key=lambda product: named.get(product.level) != product.key)
    for found in (product.attributes["key_inputs"].get("clip", {}) for product in products):
        if all(found.get(name) == value for name, value in clip.items()):
            return Precision.of(found.get("compute_dtype"))
    return None


def _nouns(config: ExtractConfig, split: Split) -> Nouns | None:
    """What pseudo boxes may be named, if they are. Raises HdovdError for files that do not fit."""
    if config.nouns is not None:
        nouns, source = read_noun_file(config.nouns), f"--nouns {config.nouns}"
    elif config.vocabulary is not None:
        nouns, source = read_nouns(config.vocabulary, config.captions, config.matching), f"--captions {config.captions}"
    else:
        return None
    if not any(nouns.offered(image.id) for image in split.images):
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
    for line in (
        f"proposals {identity} of {config.proposals}: {len(found.image_id):,d} boxes, {found.form}; "
        + made_by_line(found.made_by),
        *found.notes,
    ):
        log(line)
    before = dict(split.skips.by_reason)
    proposals = usable_proposals(found, config.proposals, split.images, split.skips)
    for line in Skips({reason: ids for reason, ids in split.skips.by_reason.items() if reason not in before}).lines():
        log(line)
    return proposals, {"file": config.proposals.name, "identity": identity, "made_by": found.made_by}


def plan_lines(
    plans: list[LevelPlan], probe: Probe | None, config: ExtractConfig, processes: int, workers: int = 0
) -> list[str]:
    """The plan as a table, with what it will cost."""
    lines = [f"plan for {config.cache}", f"  {'level':13s}{'plan':8s}{'rows':>11s}{'new':>11s}{'new bytes':>11s}  key"]
    for plan in plans:
        new = plan.new_rows if plan.parts else (0 if plan.decision == "hit" else plan.rows)
        numbers = f"{plan.rows:11,d}{new:11,d}{size(new * plan.row_bytes):>11s}"
        lines.append(f"  {plan.level:13s}{plan.decision:8s}{numbers}  {plan.key[:12]}")
        lines += [f"  {'':13s}{reason}" for reason in plan.reason.split("; ") if reason]
    if probe is not None:
        rows = {plan.level: plan.new_rows for plan in plans if plan.level in probe.costs}
        seconds = sum(cost.seconds(rows[level], workers) for level, cost in probe.costs.items()) / processes
        box, who = probe.costs[Level.INSTANCE], f"{processes} process{'es' if processes > 1 else ''}"
        who = "a Ray worker" if config.executor is Executor.RAY else who
        lines.append(
            f"  {sum(rows.values()):,d} pictures and boxes: about {duration(seconds)} (a short probe: "
            f"{1000 * box.cut_s:.2f} ms "
            f"to cut, {1000 * box.embed_s:.2f} ms to embed a box; {who} with --workers {workers})"
            + ("" if probe.gpu_bytes is None else f"; GPU memory {size(probe.gpu_bytes)}")
        )
    return lines
