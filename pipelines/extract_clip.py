"""Extraction: run the frozen CLIP once over class names, nouns, images, base boxes and proposals.

Called by `hdovd extract-clip`, `hdovd demo` and Python. Writes one cache (see `hdovd.cache.schema`); a level
whose inputs did not change is taken over from the cache that is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hdovd.cache.identity import KeyInputs, differences
from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import Level, Source
from hdovd.cache.writer import CacheWriter, LevelWriter
from hdovd.coco import ImageBoxes, Split
from hdovd.errors import HdovdError, shorten
from hdovd.pipelines.clip_teacher import ClipTeacher, load_clip
from hdovd.pipelines.crops import CropDataset, CropJob
from hdovd.pipelines.extract_config import ExtractConfig
from hdovd.pipelines.identities import level_inputs
from hdovd.pipelines.images import read_image
from hdovd.pipelines.nouns import Nouns, named_novel, read_nouns
from hdovd.pipelines.progress import progress
from hdovd.pipelines.proposal_file import NO_PROPOSALS, Proposals, read_proposals
from hdovd.protocol import load_protocol


@dataclass(slots=True)
class ExtractReport:
    """What an extraction did, for printing and for tests."""

    levels: dict[Level, str] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)


def extract_clip(config: ExtractConfig, log: Callable[[str], None] = print) -> ExtractReport:
    """Fill the cache at `config.cache`. Raises HdovdError for bad input, or if a cache that differs is in the way."""
    protocol = load_protocol(config.protocol)
    split = config.data.load("train2017", protocol, base_only=True, log=log)
    proposals = _proposals(config, split, log)
    nouns = None if config.vocabulary is None else read_nouns(config.vocabulary, config.captions)
    if nouns is not None and (leaked := named_novel(nouns.vocabulary, protocol.novel)):
        log(f"note: the vocabulary holds {len(leaked)} of the {len(protocol.novel)} novel names ({shorten(list(leaked))}); "
            "allowed, since captions hold them, and to be reported with results")
    clip = load_clip(config.clip, config.pretrained, device=config.device, precision=config.precision, activation=config.activation)
    for note in clip.notes:
        log(note)
    inputs = level_inputs(clip.identity, split.images, proposals, nouns, protocol.names, config.templates)
    report = ExtractReport(levels=_plan(config, inputs, split))
    for level, decision in report.levels.items():
        log(f"{level:9s} {decision}")
    if all(decision == "hit" for decision in report.levels.values()):
        log(f"{config.cache} is up to date: nothing to extract")
        return report
    with CacheWriter(config.cache, skipped=split.skips.by_reason) as writer:
        for level, decision in report.levels.items():
            if decision == "hit":
                writer.copy_level(level, config.cache)
        _Extraction(config, split, proposals, nouns, clip, inputs, writer, report).run()
        if len(report.failed) == len(split.images):
            raise HdovdError(f"no picture of {split.folder} can be read; first reason: {next(iter(report.failed.values()))}")
    for image_id, reason in list(report.failed.items())[:20]:
        log(f"failed: image {image_id}: {reason}")
    if report.failed:
        log(f"{len(report.failed)} images have no embeddings; training leaves them out. The reasons are in the cache")
    log(f"wrote {config.cache}: " + ", ".join(f"{count} {name}" for name, count in report.rows.items())
        + f"; {_size(config.cache) / 1e6:.1f} MB")
    return report


def _proposals(config: ExtractConfig, split: Split, log: Callable[[str], None]) -> dict[int, Proposals]:
    if config.proposals is None:
        log("no --proposals: caching base boxes alone; pseudo boxes need them")
        return {}
    shown = len(split.skips.lines())
    proposals = read_proposals(config.proposals, split.images, split.skips)
    for line in split.skips.lines()[shown:]:
        log(line)
    return proposals


def _readable_now(cache: FeatureCache, level: Level, split: Split) -> int:
    """How many images that failed before can be read now."""
    failed = cache.failed_at(level)
    count = 0
    for image in split.images:
        if image.id in failed:
            with contextlib.suppress(HdovdError):
                read_image(split.path(image), image.width, image.height)
                count += 1
    return count


def _plan(config: ExtractConfig, inputs: dict[Level, KeyInputs], split: Split) -> dict[Level, str]:
    """Per level "hit", or "extract" with the reason. Raises HdovdError if another cache would be overwritten."""
    if not config.cache.exists() or not any(config.cache.iterdir()):
        return dict.fromkeys(inputs, "extract: no cache yet")
    try:
        cache = FeatureCache(config.cache)
    except HdovdError as error:
        if not (config.cache / "zarr.json").is_file():
            raise HdovdError(f"{config.cache} is not empty and is no feature cache: give another --cache") from error
        if not config.overwrite:
            raise HdovdError(f"{config.cache} is in the way: {error}\nGive another --cache, or --overwrite to replace it") from error
        return dict.fromkeys(inputs, "extract: what is there cannot be used")
    plan, have = {}, cache.levels()
    for level, wanted in inputs.items():
        if level not in have:
            plan[level] = "extract: not in the cache yet"
        elif lines := differences(wanted, cache.key_inputs(level)):
            plan[level] = "extract: " + "; ".join(lines)
        elif level in (Level.IMAGE, Level.INSTANCE) and (repaired := _readable_now(cache, level, split)):
            plan[level] = f"extract: {repaired} images that failed before can be read now"
        else:
            plan[level] = "hit"
    if any("differs" in decision for decision in plan.values()) and not config.overwrite:
        raise HdovdError(f"{config.cache} holds a cache that was made from something else:\n"
                         + "\n".join(f"  {level}: {decision}" for level, decision in plan.items())
                         + "\nGive another --cache, or --overwrite to replace what differs")
    return plan


@dataclass(slots=True)
class _Extraction:
    """One pass over the images, and the two text levels."""

    config: ExtractConfig
    split: Split
    proposals: dict[int, Proposals]
    nouns: Nouns | None
    clip: ClipTeacher
    inputs: dict[Level, KeyInputs]
    writer: CacheWriter
    report: ExtractReport

    def run(self) -> None:
        names = {Level.CLASS: self.inputs[Level.CLASS]["names"]} | ({Level.NOUN: list(self.nouns.vocabulary)} if self.nouns else {})
        noun_rows = np.zeros((0, self.clip.dim), np.float32)
        for level, listed in names.items():
            embeddings = self.clip.embed_names(listed, self.config.templates)
            noun_rows = embeddings if level is Level.NOUN else noun_rows
            if self._wanted(level):
                self.writer.write_names(level, self.inputs[level], listed, embeddings)
            self.report.rows[f"{level} names"] = len(listed)
        if self._wanted(Level.IMAGE) or self._wanted(Level.INSTANCE):
            self._images(noun_rows)

    def _wanted(self, level: Level) -> bool:
        return self.report.levels[level] != "hit"

    def _images(self, noun_rows: np.ndarray) -> None:
        images = self.split.images
        found = [self.proposals.get(i.id, NO_PROPOSALS) for i in images]
        with_boxes = self._wanted(Level.INSTANCE)
        jobs = [CropJob(i.id, self.split.path(i), i.width, i.height,
                        np.concatenate([i.boxes, p.boxes]) if with_boxes else np.zeros((0, 4), np.float32))
                for i, p in zip(images, found, strict=True)]
        ids = [i.id for i in images]
        image_level = self.writer.image_level(self.inputs[Level.IMAGE], ids, self.clip.dim) if self._wanted(Level.IMAGE) else None
        counts = [len(job.boxes) for job in jobs]
        instance_level = (self.writer.instance_level(self.inputs[Level.INSTANCE], ids, counts, self.clip.dim)
                          if with_boxes else None)
        unnamed = 0
        for number, embeddings in self._embed(jobs):
            image, proposals = images[number], found[number]
            if image_level is not None:
                image_level.append(image.id, embedding=embeddings[:1])
            if instance_level is not None:
                unnamed += _append_instances(instance_level, image, proposals, embeddings[1:], noun_rows, self.nouns)
        for level in (image_level, instance_level):
            if level is not None:
                level.close(self.report.failed)
        self.report.rows |= {"images": len(images), "base boxes": sum(len(i.boxes) for i in images),
                             "proposals": sum(len(p.boxes) for p in found)}
        if self.nouns is not None and with_boxes:
            self.report.rows["proposals without a noun"] = unnamed

    def _embed(self, jobs: list[CropJob]) -> Iterator[tuple[int, np.ndarray]]:
        """The embeddings of every job in order, (1 + n, D): the image, then its boxes; zeros for a failed one."""
        loader = DataLoader(CropDataset(jobs, self.clip.preprocess), batch_size=None, num_workers=self.config.workers)
        waiting: list[tuple[int, Tensor]] = []
        crops = 0
        with progress(None, "CLIP", "crop", sum(len(j.boxes) + 1 for j in jobs)) as bar:
            for number, pixels, problem in loader:
                if problem:
                    self.report.failed[jobs[number].image_id] = problem
                waiting.append((number, pixels))
                crops += len(pixels)
                bar.update(len(jobs[number].boxes) + 1)
                if crops >= self.config.batch_size:
                    yield from self._flush(waiting, jobs)
                    waiting, crops = [], 0
            yield from self._flush(waiting, jobs)

    def _flush(self, waiting: list[tuple[int, Tensor]], jobs: list[CropJob]) -> Iterator[tuple[int, np.ndarray]]:
        filled = [pixels for _, pixels in waiting if len(pixels)]
        rows = (np.concatenate([self.clip.embed_images(part) for part in torch.cat(filled).split(self.config.batch_size)])
                if filled else np.zeros((0, self.clip.dim), np.float32))
        start = 0
        for number, pixels in waiting:
            if len(pixels):
                yield number, rows[start : start + len(pixels)]
            else:
                yield number, np.zeros((len(jobs[number].boxes) + 1, self.clip.dim), np.float32)
            start += len(pixels)


def _append_instances(level: LevelWriter, image: ImageBoxes, proposals: Proposals, embeddings: np.ndarray,
                      noun_rows: np.ndarray, nouns: Nouns | None) -> int:
    """Write the rows of one image; returns how many of its proposals got no noun."""
    base, extra = len(image.boxes), len(proposals.boxes)
    noun = np.full(base + extra, -1, np.int32)
    cosine = np.zeros(base + extra, np.float32)
    everything = nouns is not None and nouns.by_image is None
    offered = np.array(nouns.offered(image.id) if nouns is not None else (), np.int64)
    if len(offered) and extra:
        cosines = embeddings[base:] @ (noun_rows if everything else noun_rows[offered]).T
        noun[base:] = offered[cosines.argmax(axis=1)]
        cosine[base:] = cosines.max(axis=1)
    level.append(
        image.id,
        embedding=embeddings,
        box=np.concatenate([image.boxes, proposals.boxes]),
        source=np.repeat([Source.BASE_BOX, Source.PROPOSAL], [base, extra]).astype(np.uint8),
        annotation_id=np.concatenate([image.annotation_ids, np.full(extra, -1, np.int64)]),
        score=np.concatenate([np.ones(base, np.float32), proposals.scores]),
        noun=noun,
        noun_cosine=cosine,
    )
    return 0 if len(offered) else extra


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
