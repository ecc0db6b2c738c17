"""`hdovd cache verify --repair`: making again what is damaged in a cache, and nothing else.

Nothing is changed before it is known that the data and the CLIP still give the same keys. Products whose parts are damaged
lose those parts, and the extraction that made them goes on with them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hdovd.cache.catalog import FeatureSet, group_objects
from hdovd.cache.identity import differences
from hdovd.cache.open import open_folder
from hdovd.cache.product import Product
from hdovd.cache.schema import PART_ROWS, ROW_ARRAYS, TABLES, Level
from hdovd.cache.verify import Finding, check_records, product_names
from hdovd.cache.writer import ProductWriter
from hdovd.core.errors import HdovdError
from hdovd.pipelines.cache_tools.check_config import CheckConfig, Clips, settings_of, told_where
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.engine import Extraction
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.extraction.plan import MATCHED_BY, part_rows_of
from hdovd.pipelines.extraction.prepare import prepare

KIN = (Level.INSTANCE, Level.IMAGE, Level.PSEUDO_LABEL)  # the levels of many parts: these tell how many rows a part has
NO_CACHE = Path(os.devnull) / "no cache"  # planning against it gives the keys, whatever state the cache is in


@dataclass(slots=True)
class _Job:
    """A set to make again what is damaged of. `features`: None if the set itself is."""

    name: str
    features: FeatureSet | None
    settings: ExtractConfig
    extraction: Extraction


class Repair:
    """Makes again what `findings` name, as far as a set says how."""

    def __init__(self, config: CheckConfig, findings: Sequence[Finding], log: Callable[[str], None], clips: Clips) -> None:
        self.config, self.findings, self.log, self.clips = config, findings, log, clips
        self.folder = open_folder(config.cache)
        self.damaged: dict[tuple[Level, str], set[int | str]] = {}
        for finding in findings:
            if finding.product is not None and finding.part is not None:
                self.damaged.setdefault(finding.product, set()).add(finding.part)

    def run(self) -> bool:
        """False if there was nothing to be done."""
        jobs = self._jobs()
        self._leave_others_alone(jobs)
        groups = group_objects()
        for finding in self.findings:  # from here on the cache is changed
            if finding.place in groups:
                self.folder.write(finding.place, groups[finding.place])
                self.log(f"wrote {finding.place}")
            elif finding.product is not None and finding.part is None:
                self.folder.delete(finding.place)
                self.log(f"deleted {finding.place}")
        written: set[tuple[Level, str]] = set()
        for job in jobs:
            if job.features is None:
                self.folder.delete(f"sets/{job.name}.json")
            for level in (*KIN, *Level):  # those first that may know how large the parts of others are
                plan = job.extraction.plans.get(level)
                if plan is not None and TABLES in self.damaged.get((level, plan.key), ()) and (level, plan.key) not in written:
                    self._write_tables(job, (level, plan.key))
                    written.add((level, plan.key))
        for (level, key), parts in self.damaged.items():
            damaged = Product(self.folder, level, key)
            for part in sorted(p for p in parts if isinstance(p, int)):
                self.folder.delete(damaged.record_name(part))  # first: without it the part is not there
                for name in damaged.row_objects(part).values():
                    self.folder.delete(f"{damaged.prefix}/{name}")
                self.log(f"deleted part {part} of {level} {key[:12]}")
        for job in jobs:
            extract_clip(job.settings, self.log, self.clips.of(job.settings))
        return bool(jobs or self.damaged or any(f.place in groups or (f.product is not None and f.part is None) for f in self.findings))

    def _jobs(self) -> list[_Job]:
        """The sets that have damaged products or are damaged. Raises HdovdError if one's inputs are not what they were."""
        sets, _ = check_records(self.folder)
        asked = {name: features for name, features in sets.items() if self.config.features in (None, name)}
        jobs = [self._job(name, features) for name, features in asked.items() if self.damaged.keys() & features.levels.items()]
        for finding in self.findings:
            name = finding.place.removeprefix("sets/").removesuffix(".json")
            if finding.place == f"sets/{name}.json" and name not in sets and self.config.features in (None, name):
                jobs.append(self._job(name, None))
        return jobs

    def _job(self, name: str, features: FeatureSet | None) -> _Job:
        if features is not None and not features.made_from:
            raise HdovdError(f"set {name} of {self.config.cache} was imported: what is damaged cannot be made again from pictures. Delete "
                             "the folders of the products named above and import them again")
        settings = settings_of(self.config, name, features or FeatureSet({}))
        with told_where(name):
            extraction = prepare(replace(settings, cache=NO_CACHE), _silent, self.clips.of(settings), knowing=self._readable())
        there = set(product_names(self.folder))
        lines = [f"{level}: the cache has no product {plan.key}" for level, plan in extraction.plans.items()
                 if features is None and (level, plan.key) not in there]  # a set that is lost, and options that are not its own
        for level, key in features.levels.items() if features else ():
            plan = extraction.plans.get(level)
            if plan is None:
                lines.append(f"{level}: the settings do not make this level any more")
            elif plan.key != key:
                lines += [f"{level}: {line}" for line in self._what_changed(level, key, plan.inputs)]
        if lines:
            raise HdovdError(f"set {name} of {self.config.cache} cannot be made again, this is not what it was made from:\n  "
                             + "\n  ".join(lines) + "\nGive that (--data, --clip, --proposals, ...). Nothing was changed.")
        return _Job(name, features, settings, extraction)

    def _readable(self) -> Iterator[Product]:
        """The products whose metadata and pictures are sound."""
        damaged = {finding.product for finding in self.findings if finding.place.endswith(("/zarr.json", "/pictures"))}
        return (Product(self.folder, *name) for name in product_names(self.folder) if name not in damaged)

    def _what_changed(self, level: Level, key: str, inputs: dict[str, Any]) -> list[str]:
        try:
            lines = differences(Product(self.folder, level, key).key_inputs, inputs, sides=("it was made from", "now there is"))
        except (HdovdError, KeyError):  # its metadata are what is damaged
            lines = []
        return lines or [f"the key was {key}, and is another one now"]

    def _leave_others_alone(self, jobs: list[_Job]) -> None:
        """Take from `damaged` what no job makes again. Raises HdovdError if the jobs could copy rows from it, or not plan because of it."""
        made = {(level, plan.key) for job in jobs for level, plan in job.extraction.plans.items()}
        used = {product for features in check_records(self.folder)[0].values() for product in features.levels.items()}
        for (level, key), parts in [*self.damaged.items()]:
            unused_parts = (level, key) not in used and TABLES not in parts  # deleted, and the product is not finished any more
            if (level, key) in made or unused_parts:
                continue
            why = "another set uses it, repair it without --features" if (level, key) in used else "no set says what it was made from"
            no_metadata = any(f.place == f"{level}/{key}/zarr.json" for f in self.findings)
            if no_metadata or (jobs and level in MATCHED_BY):
                raise HdovdError(f"{self.config.cache}/{level}/{key} is damaged, and has to be repaired or deleted first: {why} (hdovd "
                                 "cache gc deletes what no set and no run uses). Nothing was changed")
            self.log(f"{level} {key[:12]} stays damaged: {why}")
            del self.damaged[level, key]

    def _write_tables(self, job: _Job, product: tuple[Level, str]) -> None:
        """Write a product's tables anew, and its metadata if these are damaged."""
        level, key = product
        plan, prefix = job.extraction.plans[level], f"{level}/{key}"
        if f"{prefix}/zarr.json" in {finding.place for finding in self.findings}:
            part_rows, made_with = self._lost_settings(job, product)
            self.folder.delete(f"{prefix}/zarr.json")
        else:
            part_rows, made_with = Product(self.folder, level, key).part_rows, {}
        self.folder.delete(f"{prefix}/parts/{TABLES}.json")
        ProductWriter.begin(self.folder, level, plan.inputs, rows=plan.rows, part_rows=part_rows, dim=plan.dim,
                            tables=job.extraction.table.tables(level), names=plan.names, made_with=made_with)
        self.log(f"wrote the tables and metadata of {level} {key[:12]}")

    def _lost_settings(self, job: _Job, product: tuple[Level, str]) -> tuple[int, dict[str, Any]]:
        """Rows a part and `made_with` of a product without metadata: what its arrays say, or else other levels of the set.

        If they are not what they were, the checksums of the parts do not fit, and the second check says so.
        """
        level, key = product
        levels = job.features.levels if job.features else {p.level: p.key for p in job.extraction.plans.values()}
        kin = [other for other in (*KIN, *Level) if other in levels and other is not level]
        part_rows = part_rows_of(level, PART_ROWS)
        clip = self.clips.of(job.settings)
        made_with = {**clip.made_with, "batch_size": job.settings.batch_size or clip.best_batch()}
        for other in reversed(kin):  # the first of them counts
            try:
                found = Product(self.folder, other, levels[other])
            except HdovdError:
                continue
            rows = found.part_rows * PART_ROWS // part_rows_of(other, PART_ROWS)
            part_rows, made_with = part_rows_of(level, rows), found.attributes["made_with"] or made_with
        for name in ROW_ARRAYS[level]:
            try:
                tree = json.loads(self.folder.read(f"{level}/{key}/{name}/zarr.json"))
                rows, shard = tree["shape"][0], tree["chunk_grid"]["configuration"]["chunk_shape"][0]
            except (FileNotFoundError, ValueError, KeyError, TypeError, IndexError):
                continue
            part_rows = shard if rows > shard else part_rows
        return part_rows, {} if level is Level.BOXES else made_with


def _silent(_: str) -> None:
    """A log that says nothing."""
