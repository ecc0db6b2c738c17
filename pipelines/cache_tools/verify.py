"""`hdovd cache verify`: what `hdovd.cache.verify` finds, and --sample, which needs the CLIP and the pictures, on top.

--repair marks what is damaged as missing; the command that made it then makes it again, as it does for all that is
unfinished.

--sample N encodes rows again and compares. It finds what no checksum can: rows that were exchanged and checksummed
anew, pictures or a CLIP that are not those of then.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.cache import DEFAULT_SET, INDEX, TABLES, TAR_META, FeatureSet, Level, Product, is_tar_form, require_same
from hdovd.cache.catalog import group_objects
from hdovd.cache.picture_files import known_files
from hdovd.cache.product import record_of
from hdovd.cache.rows import Rows
from hdovd.cache.store import open_folder
from hdovd.cache.tar_shards import TarShards
from hdovd.cache.verify import (
    Checked,
    Finding,
    ProductCheck,
    check_records,
    check_set,
    name_rows,
    product_names,
    unsealed_records,
)
from hdovd.core import HdovdError, counted, log, quiet, shorten
from hdovd.data import ImageBoxes, Split, load_protocol
from hdovd.pipelines.cache_tools.config import CheckConfig, settings_of
from hdovd.pipelines.common.console import progress, size
from hdovd.pipelines.embedding.embedders import Embedder, Pictures, embedders_of
from hdovd.pipelines.extraction.config import LabelChoice, recipe_of
from hdovd.pipelines.extraction.identities import image_hash, picture_hashes
from hdovd.pipelines.teachers.base import TEACHERS, Teacher, read_templates, shipped_templates

LEAST_COSINE = 0.99
BATCH_ROWS = 64
GONE = ImageBoxes(-1, "", 1, 1, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64))


def _tell(report: Checked, *findings: Finding) -> None:
    """Keep and print them."""
    report.findings += findings
    log(*map(str, findings))


def _sample(config: CheckConfig, features: FeatureSet, split: Split, clip: Teacher, report: Checked) -> None:
    """Encode rows of the image and the instance level again; what is below LEAST_COSINE is a finding.

    What was found already, and products that were sampled for another set, are left out. Raises HdovdError if the CLIP
    is not the cache's.
    """
    for level in (Level.IMAGE, Level.INSTANCE):
        key = features.levels.get(level, "")
        if not key or (level, key) in report.sampled:
            continue
        name, known = f"{level} {key[:12]}", {f.part for f in report.findings if f.product == (level, key)}
        if TABLES in known:
            log(f"sample of {name}: left out, its tables are damaged")
            continue
        product = Product(open_folder(config.cache), level, key)
        embedder = _embedder(product, split, clip)
        sound = [np.arange(*product.rows_of(part)) for part in range(product.parts) if part not in known]
        left = np.concatenate([np.arange(0), *sound])
        chosen = np.random.default_rng(config.seed).choice(len(left), min(config.sample, len(left)), replace=False)
        if not len(chosen):
            log(f"sample of {name}: left out, none of its rows is sound")
            continue
        rows, cosines, problems = _cosines(product, embedder, np.sort(left[chosen]))
        if problems:
            log(f"sample of {name}: {len(problems)} images could not be encoded again: {shorten([*problems], 4)}")
        if not len(rows):
            raise HdovdError(
                f"sample of {name}: none of {len(chosen)} rows could be encoded again, pictures from {split.folder}"
            )
        report.sampled[level, key] = cosines
        log(
            f"sample of {name}: {len(rows):,d} rows encoded again, cosine min {cosines.min():.4f}, mean "
            f"{cosines.mean():.4f}"
        )
        low, parts = cosines < LEAST_COSINE, rows // product.part_rows
        for part in np.unique(parts[low]).tolist():
            mine = low & (parts == part)
            _tell(
                report,
                Finding(
                    f"{product.prefix}/{product.row_objects(part)['embedding']}",
                    f"a cosine of {LEAST_COSINE} or more with the CLIP's answer",
                    f"{cosines[mine].min():.4f} at the least",
                    (level, key),
                    part,
                    name_rows(product, rows[mine]),
                ),
            )


def _embedder(product: Product, split: Split, teacher: Teacher) -> Embedder:
    """How the product's rows are embedded. Raises HdovdError if the CLIP is another one than made it.

    The precision may be another one: it costs far less than LEAST_COSINE. What was imported names no CLIP to compare
    with.
    """
    inputs, table = product.key_inputs, product.table
    by_id = {image.id: image for image in split.images}
    images = [by_id.get(image_id, GONE) for image_id in table("image_id").tolist()]
    offset, box = np.zeros(1), np.zeros((0, 4))
    if product.level is Level.INSTANCE:
        offset, box = table("offset"), table("box")
    pictures = Pictures(images, split.path, offset, box, split.exif)
    embedder = embedders_of(teacher, pictures, recipe_of(inputs))[product.level]
    if "weights_sha256" in inputs["clip"]:
        clip = {**teacher.identity, "compute_dtype": inputs["clip"].get("compute_dtype")}
        have = {"clip": clip, **embedder.inputs()}
        require_same(
            {name: inputs[name] for name in have if name in inputs},
            have,
            f"{product.folder.url}: {product} was made by another CLIP",
            "Give the one that it was made with: --clip, --pretrained.",
            sides=("the cache has", "the CLIP named has"),
        )
    return embedder


def _cosines(product: Product, embedder: Embedder, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The rows that could be encoded again, their cosines with the cache, and why others could not."""
    stored = Rows(product, "embedding", parts={int(part) for part in rows // product.part_rows})
    have = np.array([stored.read(int(row), int(row) + 1)[0] for row in rows], np.float64)
    usable = np.asarray(have.any(axis=1))  # zeros: the picture could not be read then either
    image_id, number = product.table("image_id"), embedder.images_of(rows)
    known = {*zip(*(known_files(product)[name].tolist() for name in ("image_id", "label")), strict=True)}
    labels = zip(embedder.pictures.images, product.table("image_hash").tolist(), strict=True)
    same = np.array(  # by its name, or by its contents, whatever it is called
        [label == image_hash(image) or (image.id, label) in known for image, label in labels], bool
    )
    other = np.unique(image_id[number[usable & ~same[number]]]).tolist()
    problems = [f"image {image} has another name or size in the annotations, or is not there" for image in other]
    usable &= same[number]
    batches, new = embedder.groups(rows[usable], BATCH_ROWS), np.zeros(have.shape)
    new[usable], unread = embedder.embed(progress(batches, f"sample of {product.level}", "batch"))
    problems += [f"image {image}: {problem}" for image, problem in unread.items()]
    usable &= ~np.isin(image_id[number], [*unread])
    rows, have, new = rows[usable], have[usable], new[usable]
    return rows, (new * have).sum(axis=1) / np.linalg.norm(new, axis=1) / np.linalg.norm(have, axis=1), problems


OPTIONS = (
    "clip",
    "pretrained",
    "teacher",
    "proposals",
    "vocabulary",
    "captions",
    "nouns",
    "verdicts",
    "synonyms",
    "class_embeddings",
    "protocol",
    "precision",
    "activation",
    "exif",
)  # of extract-clip, as a set's `made_from` names them


def check_cache(config: CheckConfig, teacher: Teacher | None = None) -> Checked:
    """Check a cache or a folder of tar shards; with `repair`, mark what is damaged as missing. Raises HdovdError for
    bad input.

    `teacher`: another model than the CLIP that a set names, for `sample`.
    """
    config.check()
    report = Checked()
    if is_tar_form(config.cache):
        _check_shards(config, report)
        advice = "export or copy these shards again"
    else:
        _check_folder(config, report, teacher)
        advice = "--repair marks what is damaged as missing"
    count = len(report.findings)
    log("nothing is wrong" if not count else counted(count, "finding") + ("" if config.repair else f"; {advice}"))
    if config.repair and count:
        _mark_missing(config, report.findings)
    return report


def _check_folder(config: CheckConfig, report: Checked, teacher: Teacher | None) -> None:
    folder = open_folder(config.cache)
    sets, more = check_records(folder)
    known = {*(f"sets/{name}.json" for name in sets), *(one.place for one in more)}
    if config.features is not None and f"sets/{config.features}.json" not in known:
        raise HdovdError(
            f"{config.cache} has no set of features named {config.features}; it has {', '.join(sets) or 'none'}"
        )
    _tell(report, *more)
    looked_at = {name: features for name, features in sets.items() if config.features in (None, name)}
    needed = {product: f"set {name}" for name, features in looked_at.items() for product in features.levels.items()}
    wanted = list(dict.fromkeys([*(product_names(folder) if config.features is None else ()), *needed]))
    total = sum(sum(folder.sizes(f"{level}/{key}").values()) for level, key in wanted)
    with progress(None, "verify", "B", total=total) as bar:
        bar.unit_scale = True
        for product in wanted:
            findings = ProductCheck(folder, product, needed.get(product, ""), report, bar.update).run()
            bar.clear()
            _tell(report, *findings)
    damaged = {finding.product for finding in report.findings}
    are_read = not any(one.place in group_objects() or one.place.startswith("sets/") for one in more)
    for name, features in looked_at.items():
        if are_read and damaged.isdisjoint(features.levels.items()):
            _tell(report, *check_set(folder, name, features))
    for name, features in looked_at.items() if config.sample or "data" in config.changes else ():
        _check_pictures(config, name, features, report, teacher)
    log(
        *(f"not finished, which is no fault: {line}" for line in report.unfinished),
        *(
            f"no checksum: {line} was written by an older version; what it says was not checked"
            for line in unsealed_records(folder)
        ),
        f"checked {counted(report.products, 'product')}: {size(report.bytes)} by checksum, and the rows of "
        f"{counted(report.parts, 'part')} by value",
    )


def _check_pictures(
    config: CheckConfig, name: str, features: FeatureSet, report: Checked, teacher: Teacher | None
) -> None:
    """Pictures whose files are not those that a set was made from, and a sample of its rows; nothing of products that
    are damaged.
    """
    settings, folder = settings_of(config, name, features), open_folder(config.cache)
    if config.sample and settings.teacher not in TEACHERS:
        raise HdovdError(
            f"--sample: set {name} says that it was made by {settings.teacher}, code outside of hdovd, which is not "
            "run because a cache names it. Leave --sample out"
        )
    try:
        with quiet():
            split = settings.data.load(
                "train2017", load_protocol(settings.protocol), base_only=True, exif=settings.exif
            )
        if config.sample and teacher is None:
            from hdovd.pipelines.teachers.openclip import load_clip

            compute = {name: getattr(settings, name) for name in ("device", "precision", "activation")}
            teacher = load_clip(settings.clip, settings.pretrained, **compute)
    except HdovdError as error:
        raise HdovdError(
            f"{error}\nSet {name} was made from this. If it lies elsewhere now, say where: --data (or --images, "
            "--annotations), --clip, --protocol"
        ) from error
    damaged = {finding.product for finding in report.findings}
    sound = [Product(folder, *product) for product in features.levels.items() if product not in damaged]
    if changed := picture_hashes(split, sound).changed:
        _tell(
            report,
            Finding(
                str(split.folder),
                f"the pictures that set {name} was made from",
                f"{len(changed)} of another content, which extract-clip embeds again",
                where=f"images {shorten(changed)}",
            ),
        )
    if config.sample and teacher is not None:
        _sample(config, features, split, teacher, report)


def _check_shards(config: CheckConfig, report: Checked) -> None:
    """A folder of tar shards: what it holds besides them, and each shard whole."""
    shards = TarShards(config.cache, whole=False)
    checks = [
        (TAR_META, partial(shards.meta.check_rows, f"{shards.url}/{TAR_META}")),
        *((f"{number:06d}.tar", partial(shards.verify, number)) for number in shards.numbers),
    ]
    for place, check in progress(checks, "verify", "shard"):
        try:
            check()
        except HdovdError as error:
            _tell(report, Finding(place, "what was exported", str(error)))
    log(
        f"checked {counted(len(shards.numbers), 'tar shard')} of {shards.images:,d} images: every file, by checksum "
        f"and by value"
    )


def _mark_missing(config: CheckConfig, findings: Sequence[Finding]) -> None:
    """Delete records of damaged parts and metadata, and damaged sets: all else takes them for not made yet. Says what
    makes them again.
    """
    folder, groups = open_folder(config.cache), group_objects()
    sets, _ = check_records(folder)
    broken = [finding.place for finding in findings if finding.place in groups]
    extra = [finding.place for finding in findings if finding.product is not None and finding.part is None]
    lost = [name for name in (finding.place for finding in findings) if re.fullmatch(r"sets/.+\.json", name)]
    gone = [*lost, *dict.fromkeys(filter(None, map(_record_to_delete, findings)))]
    for name in broken:
        folder.write(name, groups[name])
    for name in (*extra, *gone):
        folder.delete(name)
    log(
        *(f"wrote {name}" for name in broken),
        *(f"deleted {name}" for name in extra),
        *(f"marked as missing: {name}" for name in gone),
    )
    if not gone:
        return
    damaged = {finding.product for finding in findings if not str(finding.part).startswith(INDEX)}
    commands = [
        *(
            extract_command(config.cache, name, of.made_from)
            for name, of in sets.items()
            if damaged & of.levels.items()
        ),
        *[f"hdovd cache index {shlex.quote(str(config.cache))}"] * any(f"/{INDEX}" in name for name in gone),
        *(f"the hdovd extract-clip command of set {name[5:-5]}" for name in lost),
    ]
    what = "now run, to make them again:" if commands else "no set uses them: hdovd cache gc deletes what nothing uses"
    log(f"{counted(len(gone), 'object')} marked as missing; {what}", *(f"  {command}" for command in commands))


def _record_to_delete(finding: Finding) -> str | None:
    """The object without which a damaged part counts as missing: damaged metadata themselves, or its record."""
    if finding.product is None or finding.part is None:
        return None
    prefix = "/".join(finding.product)
    return finding.place if finding.place == f"{prefix}/zarr.json" else f"{prefix}/{record_of(finding.part)}"


def extract_command(cache: Path | str, name: str, made_from: Mapping[str, Any]) -> str:
    """The command that makes what a set lacks, with FILE where it had prompts of its own; or which it was, where the
    set does not say, or not soundly.
    """
    if not made_from:
        return f"the hdovd cache import command of set {name}"
    try:
        return shlex.join(["hdovd", "extract-clip", "--cache", str(cache), *_options(name, made_from)])
    except (KeyError, TypeError, AttributeError):
        return f"the hdovd extract-clip command of set {name}"


def _options(name: str, made_from: Mapping[str, Any]) -> list[str]:
    data, dense, crop = made_from["data"], made_from.get("dense"), made_from.get("crop")
    shipped = [one for one in shipped_templates() if read_templates(one) == tuple(made_from["templates"])]
    given = {
        "data": data["root"],
        "images": data["images"],
        "annotations": data["annotations"],
        **{option: made_from.get(option) for option in OPTIONS},
        "templates": [*shipped, "FILE"][0],
        "features": None if name == DEFAULT_SET else name,
        **({"instance_teacher": "dense", "dense_side": dense["side"]} if dense else {}),
        **({"crop": crop["shape"], "crop_scales": ",".join(map(str, crop["scales"]))} if crop else {}),
    }
    if made_from.get("nouns") or made_from.get("vocabulary"):  # sets of before there was a choice do not say it
        rule = {"choice": str(LabelChoice.MENTIONED)} | made_from.get("labels", {})
        given |= {f"label_{name}": value for name, value in rule.items()}  # top_k, temperature
    told = {f"--{option.replace('_', '-')}": str(value) for option, value in given.items() if value is not None}
    return [word for pair in told.items() for word in pair]
