"""Encoding rows of a cache again, to see whether they are still what the CLIP gives: `hdovd cache verify --sample N`.

Finds what no checksum can: rows that were exchanged and checksummed anew, pictures or a CLIP that are not those of then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hdovd.cache.catalog import FeatureSet
from hdovd.cache.content import name_rows
from hdovd.cache.identity import differences
from hdovd.cache.product import Product
from hdovd.cache.rows import open_rows
from hdovd.cache.schema import TABLES, Level
from hdovd.cache.storage import Folder
from hdovd.cache.verify import Finding
from hdovd.coco import Split
from hdovd.errors import HdovdError, shorten
from hdovd.pipelines.box_table import box_table
from hdovd.pipelines.crop_recipe import PLAIN_BOX, CropRecipe
from hdovd.pipelines.crops import CropJob, Cutter
from hdovd.pipelines.part_rows import mean_of
from hdovd.pipelines.progress import progress
from hdovd.pipelines.teacher import Teacher

LEAST_COSINE = 0.99
BATCH_ROWS = 64


@dataclass(frozen=True, slots=True)
class Sampled:
    """Cosines of a sample with what the cache holds; rows: how many."""

    rows: int
    least: float
    mean: float


@dataclass(frozen=True, slots=True)
class Sample:
    """What to sample with: `count` rows of a level, of a choice that follows from `seed`."""

    folder: Folder
    split: Split
    clip: Teacher
    count: int
    seed: int


def sample_set(sample: Sample, features: FeatureSet, findings: list[Finding], sampled: dict[tuple[Level, str], Sampled],
               log: Callable[[str], None]) -> None:
    """Encode rows of the image and the instance level again. Adds to `findings` what is below LEAST_COSINE, and to `sampled`.

    What `findings` names already, and products that `sampled` has, are left out. Raises HdovdError if the CLIP is not the cache's.
    """
    for level in (Level.IMAGE, Level.INSTANCE):
        if level not in features.levels or (level, features.levels[level]) in sampled:
            continue
        name = f"{level} {features.levels[level][:12]}"
        known = {f.part for f in findings if f.product == (level, features.levels[level])}
        if TABLES in known:
            log(f"sample of {name}: left out, its tables are damaged")
            continue
        product = Product(sample.folder, level, features.levels[level])
        _refuse_other_clip(product, sample.clip)
        chosen = _choose(product, known, sample.count, sample.seed)
        if not len(chosen):
            log(f"sample of {name}: left out, none of its rows is sound")
            continue
        rows, cosines, problems = _cosines(product, sample.split, sample.clip, chosen)
        if problems:
            log(f"sample of {name}: {len(problems)} images could not be encoded again: {shorten([*problems], 4)}")
        if not len(rows):
            raise HdovdError(f"sample of {name}: none of {len(chosen)} rows could be encoded again, pictures from {sample.split.folder}")
        sampled[level, product.key] = found = Sampled(len(rows), float(cosines.min()), float(cosines.mean()))
        log(f"sample of {name}: {found.rows:,d} rows encoded again, cosine min {found.least:.4f}, mean {found.mean:.4f}")
        for finding in _findings(product, rows, cosines):
            findings.append(finding)
            log(str(finding))


def _refuse_other_clip(product: Product, teacher: Teacher) -> None:
    """The precision may be another one: it costs far less than LEAST_COSINE. What was imported names no CLIP to compare with."""
    inputs = product.key_inputs
    if "weights_sha256" not in inputs["clip"]:
        return
    have = {"clip": {**teacher.identity, "compute_dtype": inputs["clip"].get("compute_dtype")}, "preprocessing": teacher.preprocessing}
    lines = differences({name: inputs[name] for name in have}, have, sides=("the cache has", "the CLIP named has"))
    if lines:
        raise HdovdError(f"{product.folder.url}: {product} was made by another CLIP:\n  " + "\n  ".join(lines)
                         + "\nGive the one that it was made with: --clip, --pretrained.")


def _choose(product: Product, known: set[int | str | None], count: int, seed: int) -> np.ndarray:
    """Sorted rows, spread at random over the parts that are sound."""
    left = np.concatenate([np.arange(0), *(np.arange(*product.rows_of(part)) for part in range(product.parts) if part not in known)])
    chosen = np.random.default_rng(seed).choice(len(left), min(count, len(left)), replace=False)
    return np.sort(left[chosen])


def _cosines(product: Product, split: Split, teacher: Teacher, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The rows that could be encoded again, their cosines with the cache, and why others could not."""
    image_id, image_hash = product.table("image_id"), product.table("image_hash")
    by_id = {image.id: image for image in split.images}
    number = rows if product.level is Level.IMAGE else np.searchsorted(product.table("offset"), rows, "right") - 1
    box = None if product.level is Level.IMAGE else product.table("box")
    recipe = CropRecipe.from_inputs(product.key_inputs["crop"]) if "crop" in product.key_inputs else PLAIN_BOX
    crops, cutter = 1 if box is None else len(recipe.scales), Cutter(teacher.fit, teacher.input_size)
    stored = open_rows(product, "embedding", parts={int(part) for part in rows // product.part_rows})
    done, cosines, problems = [np.zeros(0, np.int64)], [np.zeros(0)], []
    for some in progress(np.array_split(np.arange(len(rows)), -(-len(rows) // BATCH_ROWS)), f"sample of {product.level}", "batch"):
        jobs, places = list[CropJob](), list[np.ndarray]()
        have = np.array([stored.read(int(row), int(row) + 1)[0] for row in rows[some]], np.float64)
        for n in np.unique(number[some[have.any(axis=1)]]):  # zeros: the picture could not be read then either
            image = by_id.get(int(image_id[n]))
            if image is None or box_table([image], {}).image_hash[0] != image_hash[n]:
                problems.append(f"image {image_id[n]} has another name or size in the annotations, or is not there")
                continue
            of_image = np.flatnonzero((number[some] == n) & have.any(axis=1))
            regions = None if box is None else recipe.regions(box[rows[some[of_image]]], image.width, image.height)
            jobs.append(CropJob(image.id, split.path(image), image.width, image.height, regions, sum(job.count for job in jobs)))
            places.append(of_image)
        batch = cutter.batch(jobs, sum(job.count for job in jobs))
        problems += [f"image {image_id}: {problem}" for image_id, problem in batch.problems.items()]
        read = [job for job in jobs if job.image_id not in batch.problems]
        if read:
            at = np.concatenate([of_image for job, of_image in zip(jobs, places, strict=True) if job in read])
            pixels = torch.cat([batch.pixels[job.place : job.place + job.count] for job in read])
            new = mean_of(teacher.embed_images(pixels), crops).astype(np.float64)
            cosines.append((new * have[at]).sum(axis=1) / np.linalg.norm(new, axis=1) / np.linalg.norm(have[at], axis=1))
            done.append(rows[some[at]])
    return np.concatenate(done), np.concatenate(cosines), problems


def _findings(product: Product, rows: np.ndarray, cosines: np.ndarray) -> Sequence[Finding]:
    """One a part."""
    low, image_id = cosines < LEAST_COSINE, product.table("image_id")
    offset = np.arange(product.rows + 1) if product.level is Level.IMAGE else product.table("offset")
    found = []
    for part in np.unique(rows[low] // product.part_rows).tolist():
        mine = low & (rows // product.part_rows == part)
        place = f"{product.prefix}/{next(iter(product.row_objects(part).values()))}"
        found.append(Finding(place, f"a cosine of {LEAST_COSINE} or more with the CLIP's answer", f"{cosines[mine].min():.4f} at the least",
                             (product.level, product.key), part, name_rows(rows[mine], image_id, offset)))
    return found
