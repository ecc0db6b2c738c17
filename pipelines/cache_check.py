"""`hdovd cache verify`: what `hdovd.cache.verify` finds; --sample and --repair, which need the CLIP and the data, on top."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from hdovd.cache.catalog import Catalog, FeatureSet, is_tar_form
from hdovd.cache.product import Product
from hdovd.cache.schema import TAR_META, Level
from hdovd.cache.storage import Folder, open_folder
from hdovd.cache.tar_shards import TarShards
from hdovd.cache.verify import (
    Checked,
    Finding,
    Names,
    ProductCheck,
    check_groups,
    check_records,
    check_set,
    product_names,
    unsealed_records,
)
from hdovd.coco import Split
from hdovd.errors import HdovdError, counted, shorten
from hdovd.pipelines.cache_repair import Repair
from hdovd.pipelines.cache_sample import Sample, Sampled, sample_set
from hdovd.pipelines.check_config import CheckConfig, Clips, settings_of, told_where
from hdovd.pipelines.format import size
from hdovd.pipelines.picture_hashes import picture_hashes
from hdovd.pipelines.progress import progress
from hdovd.pipelines.teacher import Teacher
from hdovd.protocol import load_protocol

Log = Callable[[str], None]


@dataclass(slots=True)
class CheckReport:
    findings: list[Finding] = field(default_factory=list)
    checked: Checked = field(default_factory=Checked)
    sampled: dict[tuple[Level, str], Sampled] = field(default_factory=dict)  # by product


def check_cache(config: CheckConfig, log: Log = print, teacher: Teacher | None = None) -> CheckReport:
    """Check, and repair what is wrong if asked to; what is wrong afterwards is in the report. Raises HdovdError for bad input."""
    config.check()
    clips = Clips(teacher)
    report = _check(config, log, clips)
    before: list[Finding] = []
    while config.repair and report.findings and report.findings != before:  # again: some damage hides other damage
        before = report.findings
        if Repair(config, before, log, clips).run():
            log("checking again")
            report = _check(config, log, clips)
    return report


def _check(config: CheckConfig, log: Log, clips: Clips) -> CheckReport:
    if is_tar_form(config.cache):
        return _check_shards(config, log)
    folder, report = open_folder(config.cache), CheckReport()
    there = product_names(folder)
    _refuse_strangers(config, folder, there)
    sets, more = check_records(folder)
    if config.features is not None and config.features not in sets and not any(f.place == f"sets/{config.features}.json" for f in more):
        raise HdovdError(f"{config.cache} has no set of features named {config.features}; it has {', '.join(sets) or 'none'}")
    report.findings += (groups := check_groups(folder)) + more
    readable = not groups and len(sets) == len(folder.sizes("sets"))  # the cache as a whole, as a trainer would open it
    looked_at = {name: features for name, features in sets.items() if config.features in (None, name)}
    needed = {product: f"set {name}" for name, features in [*sets.items(), *looked_at.items()] for product in features.levels.items()}
    if config.features is not None and not config.repair:  # repair may copy rows from any product
        needed = {product: user for product, user in needed.items() if user == f"set {config.features}"}
        there = [product for product in there if product in needed]
    wanted = [*there, *(product for product in needed if product not in there)]
    for finding in report.findings:
        log(str(finding))
    _check_products(folder, wanted, needed, report, log)
    for name, features in looked_at.items():
        if readable and not any(f.product in set(features.levels.items()) for f in report.findings):
            for finding in check_set(folder, name, features):
                report.findings.append(finding)
                log(str(finding))
    for name, features in looked_at.items() if config.sample or "data" in config.changes else ():
        settings = settings_of(config, name, features.made_from)
        with told_where(name):
            protocol = load_protocol(settings.protocol)
            split = settings.data.load("train2017", protocol, base_only=True, log=lambda _: None, exif=settings.exif)
            clip = clips.of(settings) if config.sample else None
        for finding in _changed_pictures(folder, name, features, split, report.findings):
            report.findings.append(finding)
            log(str(finding))
        if clip is not None:
            sample_set(Sample(folder, split, clip, config.sample, config.seed), features, report.findings, report.sampled, log)
    for line in _summary(config, report, unsealed_records(folder)):
        log(line)
    return report


def _check_shards(config: CheckConfig, log: Log) -> CheckReport:
    """A folder of tar shards: what it holds besides them, and each shard whole."""
    shards, report = TarShards(config.cache, whole=False), CheckReport()
    checks = [(TAR_META, partial(shards.meta.check_rows, f"{shards.url}/{TAR_META}"))]
    checks += [(f"{number:06d}.tar", partial(shards.verify, number)) for number in shards.numbers]
    for place, check in progress(checks, "verify", "shard"):
        try:
            check()
        except HdovdError as error:
            report.findings.append(Finding(place, "what was exported", str(error)))
            log(str(report.findings[-1]))
    log(f"checked {counted(len(shards.numbers), 'tar shard')} of {shards.images:,d} images: every file, by checksum and by value")
    count = len(report.findings)
    log("nothing is wrong" if not count else f"{counted(count, 'finding')}; export or copy these shards again")
    return report


def _changed_pictures(folder: Folder, name: str, features: FeatureSet, split: Split, found: Sequence[Finding]) -> list[Finding]:
    """Pictures whose files are not those that a set was made from; nothing of products that are damaged."""
    damaged = {finding.product for finding in found}
    hashes = picture_hashes(split, [Product(folder, *product) for product in features.levels.items() if product not in damaged])
    if not hashes.changed:
        return []
    expected, count = f"the pictures that set {name} was made from", len(hashes.changed)
    return [Finding(str(split.folder), expected, f"{count} of another content, which extract-clip embeds again",
                    where=f"images {shorten([*hashes.changed])}")]


def _refuse_strangers(config: CheckConfig, folder: Folder, there: Names) -> None:
    """Raises HdovdError for what is no cache, or one of another schema version; a cache whose root is damaged is one."""
    try:
        Catalog(config.cache)
    except HdovdError as error:
        other_version = error.__cause__ is None and folder.exists("zarr.json")
        if other_version or not there:
            raise


def _check_products(folder: Folder, wanted: Names, needed: dict[tuple[Level, str], str], report: CheckReport, log: Log) -> None:
    total = sum(count for level, key in wanted for name, count in folder.sizes(f"{level}/{key}").items() if "/parts/" not in name)
    with progress(None, "verify", "B", total=total) as bar:
        bar.unit_scale = True
        for name in wanted:
            found = ProductCheck(folder, name, needed.get(name, ""), report.checked, bar.update).run()
            report.findings += found
            if found:
                bar.clear()
            for finding in found:
                log(str(finding))


def _summary(config: CheckConfig, report: CheckReport, unsealed: Sequence[str]) -> list[str]:
    done = report.checked
    lines = [f"not finished, which is no fault: {name}" for name in done.unfinished]
    lines += [f"no checksum: {name} was written by an older version; what it says was not checked" for name in unsealed]
    lines.append(f"checked {counted(done.products, 'product')}: {done.objects:,d} objects of {size(done.bytes)} by size and checksum, "
                 f"{done.rows:,d} rows in {done.parts:,d} parts by value")
    if not report.findings:
        lines.append("nothing is wrong")
    else:
        count = len(report.findings)
        lines.append(f"{counted(count, 'finding')}" + ("" if config.repair else "; --repair makes again what is damaged"))
    return lines
