"""`hdovd cache verify`: what `hdovd.cache.verify` finds, and --sample, which needs the CLIP and the pictures, on top.

--repair marks what is damaged as missing; the command that made it then makes it again, as it does for all that is
unfinished.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from hdovd.cache.catalog import Catalog, FeatureSet, group_objects, is_tar_form
from hdovd.cache.open import open_folder
from hdovd.cache.product import Product, record_name
from hdovd.cache.schema import DEFAULT_SET, TAR_META, Level
from hdovd.cache.store import Folder
from hdovd.cache.tar_shards import TarShards
from hdovd.cache.verify import (
    Checked,
    Finding,
    ProductCheck,
    check_groups,
    check_records,
    check_set,
    product_names,
    unsealed_records,
)
from hdovd.core.errors import HdovdError, counted, shorten
from hdovd.data.coco import Split
from hdovd.data.protocol import load_protocol
from hdovd.pipelines.cache_tools.check_config import CheckConfig, settings_of
from hdovd.pipelines.cache_tools.sample import Sample, Sampled, sample_set
from hdovd.pipelines.common.format import size
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.common.progress import progress
from hdovd.pipelines.extraction.picture_hashes import picture_hashes
from hdovd.pipelines.teachers.activation import Activation
from hdovd.pipelines.teachers.base import Teacher
from hdovd.pipelines.teachers.prompts import read_templates, shipped_templates

Log = Callable[[str], None]
OPTIONS = (
    "clip",
    "pretrained",
    "proposals",
    "vocabulary",
    "captions",
    "nouns",
    "synonyms",
    "class_embeddings",
    "protocol",
    "precision",
    "activation",
    "exif",
)  # of extract-clip, as a set's `made_from` names them


@dataclass(slots=True)
class CheckReport:
    findings: list[Finding] = field(default_factory=list)
    checked: Checked = field(default_factory=Checked)
    sampled: dict[tuple[Level, str], Sampled] = field(default_factory=dict)  # by product


def check_cache(config: CheckConfig, log: Log = print, teacher: Teacher | None = None) -> CheckReport:
    """Check a cache or a folder of tar shards; with `repair`, mark what is damaged as missing. Raises HdovdError for
    bad input.

    `teacher`: another model than the CLIP that a set names, for `sample`.
    """
    config.check()
    report = CheckReport()

    def found(findings: Sequence[Finding]) -> None:
        for finding in findings:
            report.findings.append(finding)
            log(str(finding))

    if is_tar_form(config.cache):
        _check_shards(config, found, log)
    else:
        _check_folder(config, report, found, log, teacher)
    count = len(report.findings)
    advice = (
        "export or copy these shards again"
        if is_tar_form(config.cache)
        else "--repair marks what is damaged as missing"
    )
    log("nothing is wrong" if not count else counted(count, "finding") + ("" if config.repair else f"; {advice}"))
    if config.repair and count:
        _mark_missing(config, report.findings, log)
    return report


def _check_folder(
    config: CheckConfig,
    report: CheckReport,
    found: Callable[[Sequence[Finding]], None],
    log: Log,
    teacher: Teacher | None,
) -> None:
    folder, checked = open_folder(config.cache), report.checked
    there = product_names(folder)
    try:
        Catalog(config.cache)
    except HdovdError as error:  # a cache whose root is damaged is one
        if (error.__cause__ is None and folder.exists("zarr.json")) or not there:
            raise
    sets, more = check_records(folder)
    if (
        config.features is not None
        and config.features not in sets
        and not any(f.place == f"sets/{config.features}.json" for f in more)
    ):
        raise HdovdError(
            f"{config.cache} has no set of features named {config.features}; it has {', '.join(sets) or 'none'}"
        )
    found([*check_groups(folder), *more])
    readable = not any(finding.place in group_objects() for finding in report.findings) and len(sets) == len(
        folder.sizes("sets")
    )
    looked_at = {name: features for name, features in sets.items() if config.features in (None, name)}
    needed = {product: f"set {name}" for name, features in looked_at.items() for product in features.levels.items()}
    wanted = [product for product in dict.fromkeys([*there, *needed]) if config.features is None or product in needed]
    total = sum(
        count
        for level, key in wanted
        for name, count in folder.sizes(f"{level}/{key}").items()
        if "/parts/" not in name
    )
    with progress(None, "verify", "B", total=total) as bar:
        bar.unit_scale = True
        for product in wanted:
            findings = ProductCheck(folder, product, needed.get(product, ""), checked, bar.update).run()
            if findings:
                bar.clear()
            found(findings)
    for name, features in looked_at.items():
        if readable and not any(f.product in set(features.levels.items()) for f in report.findings):
            found(check_set(folder, name, features))
    load = lru_cache(_load_clip) if teacher is None else lambda *_: teacher  # sets of one CLIP share it
    for name, features in looked_at.items() if config.sample or "data" in config.changes else ():
        _check_pictures(config, name, features, report, found, log, load)
    for line in checked.unfinished:
        log(f"not finished, which is no fault: {line}")
    for line in unsealed_records(folder):
        log(f"no checksum: {line} was written by an older version; what it says was not checked")
    log(
        f"checked {counted(checked.products, 'product')}: {checked.objects:,d} objects of {size(checked.bytes)} by "
        f"size and checksum, {checked.rows:,d} rows in {checked.parts:,d} parts by value"
    )


def _check_pictures(
    config: CheckConfig,
    name: str,
    features: FeatureSet,
    report: CheckReport,
    found: Callable[[Sequence[Finding]], None],
    log: Log,
    load: Callable[..., Teacher],
) -> None:
    """Pictures whose files are not those that a set was made from, and a sample of its rows."""
    settings, folder = settings_of(config, name, features), open_folder(config.cache)
    try:
        protocol = load_protocol(settings.protocol)
        split = settings.data.load("train2017", protocol, base_only=True, log=lambda _: None, exif=settings.exif)
        teacher = (
            load(settings.clip, settings.pretrained, settings.device, settings.precision, settings.activation)
            if config.sample
            else None
        )
    except HdovdError as error:
        raise HdovdError(
            f"{error}\nSet {name} was made from this. If it lies elsewhere now, say where: --data (or --images, "
            "--annotations), --clip, --protocol"
        ) from error
    found(_changed_pictures(folder, name, features, split, report.findings))
    if teacher is not None:
        found(
            sample_set(
                Sample(folder, split, teacher, config.sample, config.seed),
                features,
                report.findings,
                report.sampled,
                log,
            )
        )


def _load_clip(clip: str, pretrained: str | None, device: str, precision: Precision, activation: Activation) -> Teacher:
    from hdovd.pipelines.teachers.openclip import load_clip

    return load_clip(clip, pretrained, device=device, precision=precision, activation=activation)


def _changed_pictures(
    folder: Folder, name: str, features: FeatureSet, split: Split, findings: Sequence[Finding]
) -> list[Finding]:
    """Pictures whose files are not those that a set was made from; nothing of products that are damaged."""
    damaged = {finding.product for finding in findings}
    changed = picture_hashes(
        split, [Product(folder, *product) for product in features.levels.items() if product not in damaged]
    ).changed
    return (
        [
            Finding(
                str(split.folder),
                f"the pictures that set {name} was made from",
                f"{len(changed)} of another content, which extract-clip embeds again",
                where=f"images {shorten([*changed])}",
            )
        ]
        if changed
        else []
    )


def _check_shards(config: CheckConfig, found: Callable[[Sequence[Finding]], None], log: Log) -> None:
    """A folder of tar shards: what it holds besides them, and each shard whole."""
    shards = TarShards(config.cache, whole=False)
    checks = [(TAR_META, partial(shards.meta.check_rows, f"{shards.url}/{TAR_META}"))]
    checks += [(f"{number:06d}.tar", partial(shards.verify, number)) for number in shards.numbers]
    for place, check in progress(checks, "verify", "shard"):
        try:
            check()
        except HdovdError as error:
            found([Finding(place, "what was exported", str(error))])
    log(
        f"checked {counted(len(shards.numbers), 'tar shard')} of {shards.images:,d} images: every file, by checksum "
        f"and by value"
    )


def _mark_missing(config: CheckConfig, findings: Sequence[Finding], log: Log) -> None:
    """Delete records of damaged parts and metadata, and damaged sets: all else takes them for not made yet. Says what
    makes them again.
    """
    folder, groups, gone = open_folder(config.cache), group_objects(), dict[str, None]()
    sets, _ = check_records(folder)
    for finding in findings:
        if finding.place in groups:
            folder.write(finding.place, groups[finding.place])
            log(f"wrote {finding.place}")
        elif finding.product is None:
            if finding.place.startswith("sets/") and finding.place.endswith(".json"):
                gone[finding.place] = None
        elif finding.part is None:
            folder.delete(finding.place)
            log(f"deleted {finding.place}")
        else:
            level, key = finding.product
            metadata = f"{level}/{key}/zarr.json"
            gone[metadata if finding.place == metadata else record_name(f"{level}/{key}", finding.part)] = None
    for name in gone:
        folder.delete(name)
        log(f"marked as missing: {name}")
    if not gone:
        return
    damaged = {finding.product for finding in findings}
    again = {name: features for name, features in sets.items() if damaged & features.levels.items()}
    commands = [_command(config.cache, name, features) for name, features in again.items()]
    commands += [f"the hdovd extract-clip command of set {name[5:-5]}" for name in gone if name.startswith("sets/")]
    log(
        f"{counted(len(gone), 'object')} marked as missing; "
        + ("now run, to make them again:" if commands else "no set uses them: hdovd cache gc deletes what nothing uses")
    )
    for command in commands:
        log(f"  {command}")


def _command(cache: Path | str, name: str, features: FeatureSet) -> str:
    """The command that makes a set again, or which it was where the set does not say, or not soundly."""
    if not features.made_from:
        return f"the hdovd cache import command of set {name}"
    try:
        return extract_command(cache, name, features.made_from)
    except (KeyError, TypeError, AttributeError):
        return f"the hdovd extract-clip command of set {name}"


def extract_command(cache: Path | str, name: str, made_from: Mapping[str, Any]) -> str:
    """The `hdovd extract-clip` command that makes what a set lacks; FILE where it had prompts of its own."""
    data = made_from["data"]
    given = {"cache": cache, "data": data["root"], "images": data["images"], "annotations": data["annotations"]}
    given |= {option: made_from.get(option) for option in OPTIONS}
    shipped = [one for one in shipped_templates() if read_templates(one) == tuple(made_from["templates"])]
    given |= {"templates": [*shipped, "FILE"][0], "features": None if name == DEFAULT_SET else name}
    if "dense" in made_from:
        given |= {"instance_teacher": "dense", "dense_side": made_from["dense"]["side"]}
    if "crop" in made_from:
        given |= {"crop": made_from["crop"]["shape"], "crop_scales": ",".join(map(str, made_from["crop"]["scales"]))}
    if "labels" in made_from:
        given |= {f"label_{rule}": value for rule, value in made_from["labels"].items()}  # top_k, temperature
    words = [
        word
        for option, value in given.items()
        if value is not None
        for word in (f"--{option.replace('_', '-')}", str(value))
    ]
    return shlex.join(["hdovd", "extract-clip", *words])
